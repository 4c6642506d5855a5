"""``data-builder`` (or ``python -m data_builder``): datasets for training, and releases of models.

Commands import heavy libraries inside, so that ``--help`` is instant.
"""

import typer

from data_builder.cli import avatars, baselines, build, people, release
from hyperlora.cli import CommandGroup
from hyperlora.cli.options import RayCommand

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.command()(build.plan)
app.command(cls=RayCommand)(build.run)
app.command("status")(build.show_status)
app.command()(build.audit)
app.command()(build.pack)
app.command()(build.import_loras)
app.command()(people.people)
app.command()(avatars.draw_portraits)
app.command()(avatars.draw_pairs)
app.command()(avatars.build_tokenizer)
app.command()(avatars.write_benchmark)
app.command()(avatars.write_edit_benchmark)
app.command()(baselines.fit_differential_lora)
app.command()(baselines.fit_lidb_targets)
app.command()(baselines.fit_pca)
app.command()(release.fit_ood)
app.command()(release.export_identity)
app.command()(release.calibrate_identity)
app.command()(release.export_face_pack)
app.command()(release.export_sample)
app.command()(release.prune_basis)
app.command()(release.share_weights)


@app.callback()
def main_callback() -> None:
    """Build the datasets that training reads, and prepare models for release."""
