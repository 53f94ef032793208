"""The commit that environment.json names."""

import subprocess
from pathlib import Path

from spark_me.train.run_directory import git_commit


def test_commit_of_the_source(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "__init__.py").touch()
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "__init__.py").write_text("changed")
    assert git_commit(tmp_path) == f"{commit}-dirty"
