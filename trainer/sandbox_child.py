"""The inside of the sandbox: takes every right away from this process, then runs solution.py. Passed to Python as source.

Standard library only. The rules and what they cover are told in sandbox.py.
"""

import json
import os
import sys


def limit_resources(seconds: float, memory_mb: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    wanted = {"CPU": int(seconds) + 1, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0}
    if sys.platform != "darwin":  # macOS refuses to limit address space
        wanted["AS"] = memory_mb << 20
    for name, value in wanted.items():
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # at the soft limit of CPU time SIGXCPU ends the process, which tells it from other deaths
        above = name == "CPU" and (hard == resource.RLIM_INFINITY or hard > value)
        resource.setrlimit(limit, (value, value + above))


# System calls that reach other processes, the network, or past the limits above, with their numbers on x86-64 and arm64.
# socketpair is allowed: it is local, and asyncio needs it.
DENIED = """
    socket 41 198, fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, kill 62 129, tkill 200 130,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434,
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, unshare 272 97, setns 308 268,
    io_uring_setup 425 425, memfd_create 319 279, memfd_secret 447 447, shmget 29 194, msgget 68 186,
    semget 64 190, mq_open 240 180, bpf 321 280, userfaultfd 323 282, perf_event_open 298 241, keyctl 250 219,
    add_key 248 217, request_key 249 218, setsid 112 157, setpgid 109 154, setrlimit 160 164,
    setpriority 141 140, sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122,
    sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239, process_madvise 440 440
"""
SPECIAL = {  # architecture as the kernel names it, clone, clone3, tgkill, prlimit64
    "x86_64": (0xC000003E, 56, 435, 234, 302),
    "aarch64": (0xC00000B7, 220, 435, 131, 261),
}
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38


def seccomp_filter(machine: str) -> bytes:
    """The filter as BPF instructions (16-bit code, jumps if true and false, 32-bit constant), first to last."""
    import struct

    def step(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, constant)

    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, JEQ, JGE, JSET, RET|K
    number, architecture, arguments = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each
    name, clone, clone3, tgkill, prlimit = SPECIAL[machine]
    program = [
        step(load, architecture),
        step(equal, name, 1, 0),
        step(answer, KILL),
        step(load, number),
        step(at_least, 0x40000000, 0, 1),  # the x32 calls, which have other numbers
        step(answer, KILL),
    ]
    for entry in DENIED.split(","):
        call = entry.split()[1 if machine == "x86_64" else 2]
        if call != "-":
            program += [step(equal, int(call), 0, 1), step(answer, ERRNO | EPERM)]
    # the flags of clone3 cannot be read; libc falls back to clone
    program += [step(equal, clone3, 0, 1), step(answer, ERRNO | ENOSYS)]
    # threads only, limits read only, signals to this process only
    program += [step(equal, clone, 0, 4), step(load, arguments), step(any_bit, 0x10000, 1, 0)]
    program += [step(answer, ERRNO | EPERM), step(answer, ALLOW)]
    program += [step(equal, prlimit, 0, 6), step(load, arguments + 16), step(equal, 0, 0, 3)]
    program += [step(load, arguments + 20), step(equal, 0, 0, 1), step(answer, ALLOW), step(answer, ERRNO | EPERM)]
    program += [step(equal, tgkill, 0, 4), step(load, arguments), step(equal, os.getpid(), 1, 0)]
    program += [step(answer, ERRNO | EPERM), step(answer, ALLOW)]
    return b"".join([*program, step(answer, ALLOW)])


def lock_up(folder: str, parent: int) -> bool:
    """Linux: no capabilities, Landlock on files, seccomp on system calls. False where a part of it is not to be had."""
    import ctypes
    import platform
    import struct

    machine = platform.machine()
    if sys.platform != "linux" or machine not in SPECIAL or sys.maxsize < 2**32:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL: not to outlive the one that would kill it
    if os.getppid() != parent:
        os._exit(1)
    capset = {"x86_64": 126, "aarch64": 91}[machine]
    libc.syscall(capset, struct.pack("=Ii", 0x20080522, 0), bytes(24))
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        return False
    held = landlock(libc, folder)

    instructions = seccomp_filter(machine)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer))
    return libc.prctl(22, 2, program, 0, 0) == 0 and held  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def landlock(libc, folder: str) -> bool:
    """Files: reads of Python and the system's libraries, everything in `folder`, nothing else. False where it is missing."""
    import struct

    create, add_rule, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return False
    write, read, list_folder, refer, truncate, device = 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
    files = (1 << 13) - 1  # all rights of the first version
    files |= (refer if version >= 2 else 0) | (truncate if version >= 3 else 0) | (device if version >= 5 else 0)
    tcp = 3 if version >= 4 else 0  # bind, connect
    scopes = 3 if version >= 6 else 0  # abstract sockets and signals of other processes
    rules = struct.pack("=QQQ", files, tcp, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rule_set = libc.syscall(create, rules, len(rules), 0)
    if rule_set < 0:
        return False
    readable = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64")}
    rights = {
        path: read | list_folder for path in readable
    }  # libraries are mapped, which is reading; exec is not granted
    rights |= {path: read for path in ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")}
    rights |= {"/dev/null": read | write | (truncate & files), folder: files & ~1}
    for path, allowed in rights.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        failed = libc.syscall(add_rule, rule_set, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
        if failed:
            return False
    done = libc.syscall(restrict, rule_set, 0) == 0
    os.close(rule_set)
    return done


def forbid(folder: str) -> None:
    """Where the kernel does not help: an audit hook that denies sockets, processes, foreign code and writes elsewhere."""
    prefixes = tuple(
        [
            "socket.",
            "subprocess.",
            "ctypes.",
            "os.exec",
            "os.fork",
            "os.posix_spawn",
            "os.spawn",
            "os.system",
            "os.kill",
        ]
    )
    changes = set(["mkdir", "remove", "rename", "rmdir", "truncate", "link", "symlink", "chmod", "chown"])

    def inside(path) -> bool:
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep) or path == os.devnull

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(prefixes):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )
            if writes and not isinstance(path, int) and not inside(path):
                raise PermissionError("writing outside the folder is not allowed here")
        if event.removeprefix("os.") in changes and not inside(arguments[0]):
            raise PermissionError(f"{event} outside the folder is not allowed here")

    sys.addaudithook(hook)


def main() -> None:
    limits = json.loads(sys.argv[1])
    asked = json.loads(sys.stdin.read()) if limits["tests"] else None
    limit_resources(limits["seconds"], limits["memory_mb"])
    if not lock_up(os.getcwd(), limits["parent"]):
        forbid(os.getcwd())
    sys.argv[:] = ["solution.py"]
    module = type(sys)("solution" if asked else "__main__")  # tests run what is defined, not what a script does
    sys.modules[module.__name__] = module
    with open("solution.py", encoding="utf-8") as file:
        exec(compile(file.read(), "solution.py", "exec", dont_inherit=True), module.__dict__)
    if asked:
        exec(compile(asked["tests"], "tests.py", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        os.write(1, asked["token"].encode())
        os._exit(0)


if __name__ == "__main__":
    main()
