"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

BuildDir = Annotated[Path, typer.Argument(help="Folder of the build.")]
OutputDir = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
Split = Annotated[str, typer.Option(help="train, validation or test.")]
