"""environment.json: what a run was started with, where and how, besides its configuration."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import spark_me
from spark_me.machine import describe_machine
from spark_me.train import distributed


def describe_environment(device: torch.device) -> str:
    """JSON: command line, versions, commit, hardware and number of processes of this start of a run."""
    environment: dict[str, Any] = {
        "command": shlex.join(sys.orig_argv),
        "git_commit": git_commit(Path(spark_me.__file__).parent),
        "processes": distributed.world_size(),
        "device": str(device),
        **asdict(describe_machine(device.type)),
    }
    return json.dumps(environment, indent=2) + "\n"


def git_commit(package: Path) -> str | None:
    """The commit that a source folder is at, with -dirty if files differ from it; None outside a repository."""
    git = ["git", "-C", str(package)]
    try:
        # An installed package may lie, untracked, in the repository of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None
    return described.stdout.strip()
