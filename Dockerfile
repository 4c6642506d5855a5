# The service. `docker build .` is for CPUs; for a GPU's torch: `docker build --build-arg TORCH=cu128 .`
FROM python:3.12-slim-bookworm

# Which build of torch, as uv names it: cpu, cu128, cu130, rocm6.4, ...
ARG TORCH=cpu
# Extras of the package: `serve,scale` for replicas by Ray, `serve,ui` for the web page.
ARG EXTRAS=serve

ENV PYTHONUNBUFFERED=1 HF_HOME=/state/huggingface

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY hyperlora hyperlora
COPY data_builder data_builder
COPY checkpoints checkpoints
# One resolver takes torch and torchvision from one index: builds that do not match break `import torchvision`.
RUN pip install --no-cache-dir --root-user-action=ignore "uv>=0.9,<1" \
    && uv pip install --system --no-cache --torch-backend="${TORCH}" --editable ".[${EXTRAS}]" \
    && useradd --create-home --uid 1000 hyperlora \
    && install --directory --owner hyperlora /state

USER 1000
VOLUME /state
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

# Keys are needed on every address but 127.0.0.1: mount a file at /run/secrets/keys, or give other arguments.
# All connections to a container may come from one address, that of the proxy or of Docker's bridge.
ENTRYPOINT ["hyperlora", "serve"]
CMD ["--host", "0.0.0.0", "--state-dir", "/state", "--api-key-file", "/run/secrets/keys", \
     "--max-connections-per-address", "0"]
