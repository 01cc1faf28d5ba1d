"""`make lock`: resolves pyproject.toml into constraints.txt (versions) and requirements/*.txt (versions and hashes).

Versions that constraints.txt has are kept. Options are passed on to uv: `make lock UV="--upgrade-package numpy"`.
Nothing is installed. The locks hold for CPython 3.11 to 3.14 on Linux and macOS.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {  # the extras of each; None: all of them
    "dev": None,
    "train": ("train", "deepspeed", "serve", "judges"),
    "orchestrator": ("orchestrate", "prepare", "kubernetes", "postgres"),
}
ENVIRONMENTS = (
    "python_version < '3.15' and sys_platform == 'darwin'",
    "python_version < '3.15' and sys_platform == 'linux'",
)
# The marker that uv puts on every line because of ENVIRONMENTS.
COMMON = re.compile(r"python_full_version < '3\.15' and |\(sys_platform == 'darwin' or sys_platform == 'linux'\)|"
                    r"sys_platform == 'darwin' or sys_platform == 'linux'")  # fmt: skip
# torch is built anew for each platform (CPU, CUDA, ROCm), under the same version and with other hashes.
TORCH = re.compile(r"^(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==", re.M)

CONSTRAINTS_HEAD = (
    "# The versions that are tested together. Made by `make lock`, which keeps them; see CONTRIBUTING.md.\n"
)
LOCK_HEAD = """\
# Made by `make lock` from pyproject.toml and constraints.txt: what the extras {extras} need, with hashes.
# Without torch and the CUDA libraries that come with it: the same version has other hashes in a build for another
# platform. It is installed by its version in constraints.txt, after these. Without phantom-video itself: a folder
# has no hash. Install with `pip install --no-deps --require-hashes -r`.
"""


def main() -> None:
    options = sys.argv[1:]
    with TemporaryDirectory() as folder:
        work = Path(folder)
        environments = ", ".join(f'"{marker}"' for marker in ENVIRONMENTS)
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (work / "pyproject.toml").write_text(
            f"{project}\n[tool.uv]\nenvironments = [{environments}]\n", encoding="utf-8"
        )
        shutil.copy(ROOT / "README.md", work)

        versions = work / "constraints.txt"
        shutil.copy(ROOT / "constraints.txt", versions)  # uv prefers the versions of the file that it writes
        resolve(work, "constraints.txt", ["--all-extras", *options])
        made = {ROOT / "constraints.txt": CONSTRAINTS_HEAD + versions.read_text(encoding="utf-8")}

        leave_out = [f"--no-emit-package={name}" for name in sorted(set(TORCH.findall(versions.read_text("utf-8"))))]
        for name, extras in LOCKS.items():
            chosen = ["--all-extras"] if extras is None else [f"--extra={extra}" for extra in extras]
            shutil.copy(versions, work / f"{name}.txt")
            resolve(work, f"{name}.txt", [*chosen, "--generate-hashes", *leave_out])
            head = LOCK_HEAD.format(extras=", ".join(extras) if extras else "of pyproject.toml, all of them,")
            made[ROOT / f"requirements/{name}.txt"] = head + (work / f"{name}.txt").read_text(encoding="utf-8")
    for file, text in made.items():  # once all of them could be resolved
        file.write_text(text, encoding="utf-8")


def resolve(work: Path, output: str, options: list[str]) -> None:
    """`uv pip compile` for every Python and platform at once; drops the marker that all lines share."""
    uv = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", "pyproject.toml", "--universal"]
    plain = ["--python-version=3.11", "--no-annotate", "--no-header", f"--output-file={output}"]
    subprocess.run([*uv, *plain, *options], cwd=work, check=True)
    file = work / output
    file.write_text("\n".join(map(simplify, file.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")


def simplify(line: str) -> str:
    """`numpy==2.3.5 ; <the marker that all lines share>` as `numpy==2.3.5`; other markers keep what is their own."""
    requirement, semicolon, rest = line.partition(" ; ")
    if not semicolon:
        return line
    continued = " \\" if rest.endswith(" \\") else ""
    marker = COMMON.sub("", rest.removesuffix(" \\")).removesuffix(" and ").strip()
    return f"{requirement} ; {marker}{continued}" if marker else f"{requirement}{continued}"


if __name__ == "__main__":
    main()
