"""What runs inside the sandbox: shuts itself in, then runs the code and its tests.

A script of the standard library alone, since it starts once a completion. It reads its program as
JSON from standard input, and writes lines of the program's nonce to standard output: "ready", then
the number of each test that passed.
"""

import ctypes
import json
import os
import resource
import sys

NOBODY = 65534
CAP_DAC_READ_SEARCH = 2
PR_SET_KEEPCAPS = 8
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522
SYS_MOUNT_SETATTR = 442  # the same on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4


def main() -> None:
    program = json.load(sys.stdin)
    verdict = os.dup(sys.stdout.fileno())
    nothing = os.open(os.devnull, os.O_RDWR)
    if program["isolated"]:
        shut_in(os.getcwd())
    limit(program["seconds"], program["memory"], program["output"])

    code, tests, nonce = program["code"], program["tests"], program["nonce"]

    def say(what: object) -> None:
        os.write(verdict, f"{nonce} {what}\n".encode())

    say("ready")
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    names: dict[str, object] = {"__name__": "completion"}
    if passes(code, names):
        for place, test in enumerate(tests):
            if passes(test, names):
                say(place)
    os._exit(0)  # nothing that the code left behind has a say


def passes(code: str, names: dict[str, object]) -> bool:
    """Whether the code raises nothing; an exit is no pass either."""
    try:
        exec(compile(code, "<completion>", "exec", dont_inherit=True), names)
    except BaseException:
        return False
    return True


def shut_in(folder: str) -> None:
    """Makes every file read-only but those of a small folder in memory, and gives up all rights
    except, where the process is the real root, to read: root's interpreter may be root's alone.

    Raises:
      OSError: the kernel does not let it.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    changes = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    arguments = (AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(changes), ctypes.sizeof(changes))
    must(libc.syscall(SYS_MOUNT_SETATTR, *arguments))
    must(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=64m,nr_inodes=4k,mode=777"))
    os.chdir(folder)
    must(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    kept = 0
    try:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        kept = 1 << CAP_DAC_READ_SEARCH
    except OSError:
        pass  # a user namespace knows no nobody
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    rights = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable
    must(libc.capset(ctypes.byref(header), ctypes.byref(rights)))


def limit(seconds: int, memory: int, output: int) -> None:
    """Bounds what the process may take; none of it can be raised again."""
    for what, most in (
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NPROC, 1),  # itself
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
