"""Calls what only an attacker needs; each must fail with "not permitted"."""

import ctypes
import errno
import platform

NUMBERS = {  # name: (x86_64, aarch64, arguments)
    "unshare(user)": (272, 97, (0x10000000,)),
    "unshare(mount)": (272, 97, (0x00020000,)),
    "setns": (308, 268, (0, 0)),
    "io_uring_setup": (425, 425, (1, 0)),
    "keyctl": (250, 219, (0, 0)),
    "add_key": (248, 217, (0, 0, 0, 0, 0)),
    "request_key": (249, 218, (0, 0, 0, 0)),
    "userfaultfd": (323, 282, (0,)),
    "bpf": (321, 280, (0, 0, 0)),
    "perf_event_open": (298, 241, (0, 0, 0, 0, 0)),
    "process_vm_readv": (310, 270, (1, 0, 0, 0, 0, 0)),
    "process_vm_writev": (311, 271, (1, 0, 0, 0, 0, 0)),
    "pidfd_getfd": (438, 438, (0, 0, 0)),
    "kcmp": (312, 272, (1, 1, 0, 0, 0)),
    "mount": (165, 40, (0, 0, 0, 0, 0)),
    "open_tree": (428, 428, (0, 0, 0)),
    "fsopen": (430, 430, (0, 0)),
    "pivot_root": (155, 41, (0, 0)),
    "chroot": (161, 51, (0,)),
    "open_by_handle_at": (304, 265, (0, 0, 0)),
    "init_module": (175, 105, (0, 0, 0)),
    "kexec_load": (246, 104, (0, 0, 0, 0)),
    "reboot": (169, 142, (0, 0, 0, 0)),
    "fadvise64": (221, 223, (-1, 0, 0, 4)),
    "readahead": (187, 213, (-1, 0, 0)),
    "mincore": (27, 232, (0, 1, 0)),
    "cachestat": (451, 451, (-1, 0, 0, 0)),
    "preadv2(no wait)": (327, 286, (-1, 0, 0, 0, 0, 8)),
    "preadv2(drop)": (327, 286, (-1, 0, 0, 0, 0, 128)),
    "sync": (162, 81, ()),
    "syncfs": (306, 267, (-1,)),
    "vmsplice": (278, 75, (-1, 0, 0, 0)),
    "remap_file_pages": (216, 234, (0, 0, 0, 0, 0)),
    "seccomp": (317, 277, (1, 0, 0)),
    "prctl(a filter)": (157, 167, (22, 2, 0, 0, 0)),
    "prctl(a filter), as 64 bits": (157, 167, (2**32 + 22, 2, 0, 0, 0)),
    "prctl(scheduling by core)": (157, 167, (62, 1, 0, 0, 0)),
    "prctl(speculation)": (157, 167, (53, 0, 4, 0, 0)),
    "setsockopt(a filter)": (54, 208, (-1, 1, 26, 0, 0)),
    "setsockopt(a filter), as 64 bits": (54, 208, (-1, 2**32 + 1, 2**32 + 26, 0, 0)),
    "setsockopt(a program)": (54, 208, (-1, 1, 50, 0, 0)),
    "setsockopt(a filter of many)": (54, 208, (-1, 1, 51, 0, 0)),
    "swapon": (167, 224, (0, 0)),
    "personality": (135, 92, (0x0040000,)),
    "mmap(huge pages)": (9, 222, (0, 2**21, 3, 0x40022, -1, 0)),
    "memfd_create(huge pages)": (319, 279, (0, 4)),
    "shmget(huge pages)": (29, 194, (0, 2**21, 0o5600)),
    "clone(new user)": (56, 220, (0x10000011, 0, 0, 0, 0)),
}
libc = ctypes.CDLL(None, use_errno=True)
column = 1 if platform.machine() == "aarch64" else 0
passed = []
for name, (*numbers, arguments) in NUMBERS.items():
    ctypes.set_errno(0)
    answer = libc.syscall(numbers[column], *map(ctypes.c_long, arguments))
    if answer != -1 or ctypes.get_errno() != errno.EPERM:
        passed.append(f"{name}: {answer} {errno.errorcode.get(ctypes.get_errno())}")
print(passed)
raise SystemExit(len(passed))
