"""Runs the steps of the Dockerfile as far as no image can be pulled: `python3 tools/check_dockerfile.py [--build] PROGRAM`.

The second stage runs word for word in a folder of its own, with chroot: its COPY and RUN steps, and then the program as the image's user
and as another one, with the image's environment, volume and working folder. This machine's bash, useradd and install stand in for those
of the base image. PROGRAM is a built `mmpo-fast`, which stands in for what the first stage makes.

The first stage is checked in part: the names of Debian's packages are looked up, every COPY is done into a plain folder without what
.dockerignore leaves out, and what follows the build is run there. With `--build` its nvcc is fetched and its program built there too, in some minutes; PROGRAM
is not needed then. Needs root, as a container's builder does. Exit code 3: not root, or no chroot here.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
WORK = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")).resolve() / "dockerfile"
# What the second stage takes from its base image.
BASE_PROGRAMS = ["bash", "sh", "env", "useradd", "install", "nologin"]
BASE_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
    "etc/group": "root:x:0:\n",
    "etc/shadow": "root:*:20000:0:99999:7:::\n",
    "etc/gshadow": "root:*::\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\n",
    "etc/login.defs": "UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\nUSERGROUPS_ENAB yes\n",
}
# The program needs at most these of the base image, which every Ubuntu has for apt.
BASE_LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2", "linux-vdso.so.1"}


class Stage:
    """A stage: its root folder here, and what its instructions have set so far."""

    def __init__(self, root):
        self.root, self.folder, self.user = root, "/", "0:0"
        self.environment, self.entry, self.command = {}, [], []
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)

    def path(self, name):
        """Where a path of the stage lies on this machine."""
        return self.root / os.path.normpath(os.path.join(self.folder, name)).lstrip("/")


def instructions(text):
    """The instructions of a Dockerfile: their words and the rest of their lines, comments left out and lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), rest.strip()


def context():
    """The files that `docker build` is sent: those of the working tree but for what .dockerignore names."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, check=True, text=True
    ).stdout
    rules = [line.strip() for line in (REPOSITORY / ".dockerignore").read_text().splitlines()]
    rules = [rule.rstrip("/") for rule in rules if rule and not rule.startswith("#")]
    assert not any(rule.startswith("!") for rule in rules), "exceptions of .dockerignore are not known here"

    def is_left_out(name):
        parts = name.split("/")
        heads = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        return any(fnmatch.fnmatchcase(head, rule) for head in heads for rule in rules)

    return [name for name in listed.split("\0") if name and not is_left_out(name) and (REPOSITORY / name).is_file()]


def run(words, step, **options):
    """Runs a command, and ends with what it said where it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}check_dockerfile.py: ended with {done.returncode}: {step}")
    return done.stdout


def put(source, target):
    """Copies a file, its permissions too, or a folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


def copy(stage, rest, stages):
    """COPY from the context or from an earlier stage."""
    words = shlex.split(rest)
    origin = words.pop(0).partition("--from=")[2] if words[0].startswith("--from=") else None
    *sources, target = words
    for source in sources:
        into = stage.path(target) / os.path.basename(source) if target.endswith("/") else stage.path(target)
        if origin:
            made = stages[origin].path(source)
            if not made.exists():
                sys.exit(f"check_dockerfile.py: the stage {origin} has nothing for COPY {rest}")
            put(made, into)
            continue
        names = [name for name in context() if source == "." or name == source or name.startswith(source + "/")]
        if not names:
            sys.exit(f"check_dockerfile.py: the context has nothing for COPY {rest}")
        for name in names:
            put(REPOSITORY / name, into / name if source == "." else into)


def build_command(stage, command, arguments):
    """One command of a RUN of the first stage, which runs in a plain folder: so nothing that is the machine's is touched."""
    packages = re.fullmatch(r"apt-get install ((?:\S+ ?)+)", command)
    if packages:
        names = [word for word in packages[1].split() if not word.startswith("-")]
        known = [name for name in names if subprocess.run(["apt-cache", "show", name], capture_output=True).returncode == 0]
        has_lists = subprocess.run(["apt-cache", "show", "bash"], capture_output=True).returncode == 0
        if has_lists and known != names:
            sys.exit(f"check_dockerfile.py: of {names}, Debian has {known}")
        return f"looked up {', '.join(names)}" if has_lists else "not checked: no lists of packages (apt-get update)"
    if command in ("apt-get update", "rm -rf /var/lib/apt/lists/*"):
        return "left out"
    if not arguments.build and command == "sh tools/setup_cuda.sh":
        return "left out: .ci/run runs it, and --build does"
    if not arguments.build and re.fullmatch(r"([A-Z_]+=\S+ )*cargo build .*", command):
        put(arguments.program, stage.path("target/release/mmpo-fast"))
        return f"in its place {arguments.program}"
    if re.search(r"(^|[\s=])/", command):
        sys.exit(f"check_dockerfile.py: a path of the machine in the first stage, which is not run here: {command}")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME") if name in os.environ}
    run(["bash", "-euo", "pipefail", "-c", command], command, cwd=stage.path("."), env=kept)
    return "run"


def in_image(stage, words, step, user=None):
    """Runs a command inside the second stage's folder; /proc and /dev are this machine's where they may be mounted."""
    root = shlex.quote(str(stage.root))
    mounts = "".join(f"mount --rbind /{name} {root}/{name} 2>/dev/null || :; " for name in ("proc", "dev"))
    variables = [f"{name}={value}" for name, value in stage.environment.items()]
    inside = ["/usr/bin/env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", *variables]
    inside += ["bash", "-c", f"cd {shlex.quote(stage.folder)} && exec {shlex.join(words)}"]
    chroot = shlex.join(["chroot", f"--userspec={user or stage.user}", str(stage.root), *inside])
    return run(["unshare", "--mount", "bash", "-c", mounts + "exec " + chroot], step)


def base_image(stage):
    """What of the base image the second stage needs: a few programs of this machine with their libraries, and files of users."""
    for name in ("proc", "dev", "tmp", "root", "home", "usr/bin", "usr/sbin", "usr/lib", "usr/local/bin", "etc"):
        (stage.root / name).mkdir(parents=True, exist_ok=True)
    (stage.root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (stage.root / "usr" / name).mkdir(exist_ok=True)
        (stage.root / name).symlink_to(f"usr/{name}")
    for name, text in BASE_FILES.items():
        (stage.root / name).write_text(text)
    for name in BASE_PROGRAMS:
        program = shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin")
        put(pathlib.Path(program).resolve(), stage.root / program.lstrip("/"))
        libraries(stage, program)


def libraries(stage, program):
    """Puts the libraries of a program into the stage; the answer is their names."""
    names = set()
    for line in run(["ldd", program], f"ldd {program}").splitlines():
        words = line.split()
        names.add(os.path.basename(words[0]))
        path = next((word for word in words if word.startswith("/")), None)
        if path:
            put(pathlib.Path(path).resolve(), stage.root / path.lstrip("/"))
    return names


def use(stage):
    """Uses the image as docs/install.md does: as its own user, and as another one who brings a folder."""
    program = stage.path("/usr/local/bin/mmpo-fast")
    foreign = libraries(stage, program) - BASE_LIBRARIES
    assert not foreign, f"the base image need not have {foreign}"
    command = [*stage.entry, *stage.command]
    said = in_image(stage, command, shlex.join(command))
    assert "/cache/mmpo-fast" in said, f"doctor does not look at the volume's cache:\n{said}"
    folder, train = stage.path("."), [*stage.entry, "train", "--max-steps", "2", "--device", "cpu"]
    # Of other lengths the references are others: a user's files are no use to another one.
    for user, length in ((stage.user, "160"), ("12345:12345", "150")):
        uid, gid = map(int, user.split(":"))
        os.chown(folder, uid, gid)
        in_image(stage, [*train, "--max-length", length, "--output", f"run-{uid}"], f"train as {user}", user)
        assert (folder / f"run-{uid}/model/model.safetensors").stat().st_uid == uid
    owners = {path.stat().st_uid for path in stage.path("/cache/mmpo-fast").rglob("*")}
    assert {10001, 12345} <= owners, f"reference log-probs are kept for {owners} alone"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("program", nargs="?", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--build", action="store_true")
    arguments = parser.parse_args()
    if not arguments.build and not (arguments.program and arguments.program.is_file()):
        sys.exit("check_dockerfile.py: name a built mmpo-fast, or give --build")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "chroot", "/", "true"], capture_output=True).returncode != 0:
        print("check_dockerfile.py: no chroot for this user: the Dockerfile's steps are not run", file=sys.stderr)
        sys.exit(3)

    stages, stage = {}, None
    for word, rest in instructions((REPOSITORY / "Dockerfile").read_text()):
        done = "done"
        match word:
            case "FROM":
                base, _, name = rest.partition(" AS ")
                stage = stages[name or "image"] = Stage(WORK / (name or "image"))
                done = f"in place of {base}, {stage.root}"
                if not name:
                    base_image(stage)
            case "SHELL":
                assert json.loads(rest) == ["/bin/bash", "-euo", "pipefail", "-c"], rest
            case "WORKDIR":
                stage.folder = os.path.join(stage.folder, rest)
                stage.path(".").mkdir(parents=True, exist_ok=True)
            case "COPY":
                copy(stage, rest, stages)
            case "RUN" if "image" in stages:
                in_image(stage, ["bash", "-c", rest], rest)
                done = "run"
            case "RUN":
                commands = [command.strip() for command in rest.split("&&")]
                done = "; ".join(f"`{command.split()[0]}` {build_command(stage, command, arguments)}" for command in commands)
            case "ENV":
                stage.environment.update(pair.split("=", 1) for pair in shlex.split(rest))
            case "VOLUME":
                assert all(stage.path(folder).is_dir() for folder in json.loads(rest)), rest
            case "USER":
                assert re.fullmatch(r"\d+:\d+", rest), "by its number, for Kubernetes"
                passwd = stage.path("/etc/passwd").read_text()
                assert f":x:{rest}:" in passwd, f"no user {rest} in {passwd}"
                stage.user = rest
            case "ENTRYPOINT":
                stage.entry = json.loads(rest)
            case "CMD":
                stage.command = json.loads(rest)
            case _:
                sys.exit(f"check_dockerfile.py: {word} is not known here")
        print(f"{word} {rest[:60]}{'...' if len(rest) > 60 else ''}: {done}")
    use(stage)
    shutil.rmtree(WORK)
    print("the image's steps ran, and the program in it as two users")


main()
