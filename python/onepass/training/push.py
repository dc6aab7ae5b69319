"""Uploading what a run made, where --push_to_hub asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .run_folder import RunFolder, tell


def push(run: RunFolder, trainer: Any, files: Sequence[str]) -> None:
    """Upload a finished run's files; the Trainer has uploaded its checkpoints, if anything."""
    if not trainer.args.push_to_hub or not run.is_main:
        return
    import huggingface_hub

    huggingface_hub.upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=run.path,
        allow_patterns=list(files),
        commit_message="End of training",
        token=trainer.args.hub_token,
    )
    tell(f"uploaded to {trainer.hub_model_id}")
