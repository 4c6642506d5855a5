# RUN= uses the environment that is already active.
RUN ?= uv run

.PHONY: check test mutation avatars teachers
.NOTPARALLEL:

check: ## style, types and the direction of imports
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports

test:
	$(RUN) pytest

mutation: ## single faults in the mathematical core: how many the quick tests notice
	uv run --group mutation python -m benchmarks.mutation.run

# The embedded bundle, from nothing. Stages run in this order; the shipped weights took about 22
# hours on two CPU cores. A finished stage leaves a file in $(DONE), and the next `make avatars`
# skips it; an interrupted training resumes at the last checkpoint of its run. To repeat a stage,
# remove that file and runs/avatars/STAGE.
DONE := runs/avatars/done
STAGES := portraits tokenizer benchmark 01_vae 02_vae_refine 03_text_to_image \
	04_text_to_image_wide 05_latent_classifier 06_text_to_image_attributes 07_evaluator \
	calibrate-identity 08_photo_encoder 09_face_detector 10_face_recognizer face-pack \
	11_hypernetwork image-to-lora-sidecars plan build lora-components 12_lora_diffusion lora-diffusion \
	pairs edit-benchmark 13_instruct_pix2pix 14_instruct_pix2pix_refine 15_pair_instructions \
	16_pair_hypernetwork share-encoder 17_vae_decoder vae
BUILDER := $(RUN) data-builder
PLAN_OPTIONS := --portraits-per-identity 11 --init network --finetune-steps 12 --lr 3e-4 \
	--subjects-per-batch 32 --dtype bfloat16 --num-val-photos 3 --eval-every 6
FINISH = @mkdir -p $(DONE) && touch $@

avatars: $(addprefix $(DONE)/,$(STAGES)) ## all weights and data of checkpoints/avatars

# Stages with a configuration: a training.
$(DONE)/%:
	$(RUN) hyperlora train fit --config configs/avatars/$*.yaml --ckpt_path last
	$(FINISH)

$(DONE)/portraits:
	$(BUILDER) draw-portraits -o runs/data/train --num-subjects 10000 --portraits-per-identity 4
	$(BUILDER) draw-portraits -o runs/data/validation --split validation --num-subjects 250 \
		--portraits-per-identity 4
	$(FINISH)

$(DONE)/tokenizer:
	$(BUILDER) build-tokenizer -o runs/avatars/tokenizer
	$(FINISH)

$(DONE)/benchmark:
	$(BUILDER) write-benchmark -o checkpoints/avatars/test
	$(FINISH)

$(DONE)/calibrate-identity:
	$(BUILDER) calibrate-identity runs/data/validation
	$(FINISH)

$(DONE)/face-pack:
	$(BUILDER) export-face-pack -o checkpoints/avatars/face-pack \
		runs/avatars/09_face_detector/network runs/avatars/10_face_recognizer/network
	$(FINISH)

$(DONE)/image-to-lora-sidecars:
	$(BUILDER) fit-ood runs/data/train runs/data/validation
	$(BUILDER) export-identity runs/avatars/08_photo_encoder/classifier
	$(FINISH)

$(DONE)/plan:
	$(BUILDER) plan avatars:0-2048 -o runs/avatars/build $(PLAN_OPTIONS)
	$(BUILDER) plan avatars:1000000-1000064 -o runs/avatars/build-validation $(PLAN_OPTIONS)
	$(FINISH)

$(DONE)/build:
	$(BUILDER) run runs/avatars/build-validation
	$(BUILDER) run runs/avatars/build
	$(FINISH)

$(DONE)/lora-components:
	$(BUILDER) fit-pca runs/avatars/build -o runs/avatars/lora-components --components-per-factor 8
	$(FINISH)

$(DONE)/lora-diffusion:
	mkdir -p checkpoints/avatars/lora-diffusion
	cp -r runs/avatars/12_lora_diffusion/model/. checkpoints/avatars/lora-diffusion
	$(BUILDER) share-weights checkpoints/avatars/lora-diffusion image-to-lora
	$(BUILDER) export-sample runs/avatars/build -o checkpoints/avatars/loras --max-bytes 330000 \
		--no-statistics
	$(FINISH)

$(DONE)/pairs:
	$(BUILDER) draw-pairs -o runs/data/edits
	$(BUILDER) draw-pairs -o runs/data/edits-of-three --subjects-per-edit 3 --num-edits 20000
	$(BUILDER) draw-pairs -o runs/data/edits-two --subjects-per-edit 3 --two-edit-fraction 1
	$(BUILDER) draw-pairs -o runs/data/edits-validation --split validation --num-edits 160
	$(FINISH)

$(DONE)/edit-benchmark:
	$(BUILDER) write-edit-benchmark -o checkpoints/avatars/test-edits --edits-per-kind 1
	$(FINISH)

$(DONE)/share-encoder:
	$(BUILDER) share-weights checkpoints/avatars/pair-to-lora image-to-lora
	$(FINISH)

$(DONE)/vae:
	cp -r runs/avatars/17_vae_decoder/vae checkpoints/avatars/base/
	$(FINISH)

# DiffLoRA as published, which ships nothing yet: LoRAs fitted from scratch, for
# configs/avatars/ablations/difflora_autoencoder.yaml and difflora.yaml. 16 people come first; all
# others start at their mean.
teachers: $(DONE)/teachers-start $(DONE)/teachers ## LoRAs of drawn people, fitted from scratch

TEACHER_OPTIONS := --portraits-per-identity 8 --shared-noise --lr-scheduler cosine
TEACHER_FIT := $(TEACHER_OPTIONS) --init mean --init-from runs/avatars/teachers-start \
	--finetune-steps 100 --lr 6e-3 --lr-warmup-steps 10

$(DONE)/teachers-start:
	$(BUILDER) plan avatars:0-16 -o runs/avatars/teachers-start $(TEACHER_OPTIONS) \
		--finetune-steps 300 --lr 2e-3 --lr-warmup-steps 20
	$(BUILDER) run runs/avatars/teachers-start
	$(FINISH)

$(DONE)/teachers:
	$(BUILDER) plan avatars:1000000-1000064 -o runs/avatars/teachers-validation $(TEACHER_FIT)
	$(BUILDER) run runs/avatars/teachers-validation
	$(BUILDER) plan avatars:0-1024 -o runs/avatars/teachers $(TEACHER_FIT)
	$(BUILDER) run runs/avatars/teachers
	$(FINISH)
