"""Runs cases of CUDA kernels in a library built for the host; a process of its own, under libasan. No torch in it.

stdin: a pickled (library path, [case]); stdout: a pickled [result]. A case is a dict: `function`; `buffers` {name: bytes, or
{"size", "at": {offset: bytes}} of which the rest is never touched}; `shift` {name: bytes past a 16-byte border}; `pointers`
{name: [(byte offset, buffer)]} to be filled in; `arguments`, each a number or a buffer's name; `types`, one letter each
(p pointer, i int, l int64, f float); `seed`; `blocks` (first, last) or None; `read` {name: [(offset, length)] or None for all}.
"""

import ctypes
import mmap
import pickle
import sys

TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}
MAP_NORESERVE = 0x4000  # Linux's; in mmap from Python 3.13 on
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
keep = []


def allocate(content, shift):
    """(address, size): its end lies against ASan's redzone; a sparse buffer takes only the pages that are touched."""
    if isinstance(content, dict):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        region = mmap.mmap(-1, content["size"], flags=flags)
        keep.append(region)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for offset, data in content["at"].items():
            ctypes.memmove(address + offset, data, len(data))
        return address, content["size"]
    address = libc.malloc(len(content) + shift) + shift
    ctypes.memmove(address, content, len(content))
    return address, len(content)


def run(library, case):
    at = {name: allocate(content, case["shift"].get(name, 0)) for name, content in case["buffers"].items()}
    for name, fills in case["pointers"].items():
        for offset, other in fills:
            ctypes.c_int64.from_address(at[name][0] + offset).value = at[other][0]
    library.cuda_host_setup(case["seed"], *(case["blocks"] or (0, 2**62)))
    function = getattr(library, case["function"])
    function.argtypes = [TYPES[t] for t in case["types"]]
    status = function(*(at[x][0] if isinstance(x, str) else x for x in case["arguments"]))
    result = {"status": status, "error": library.cuda_host_error().decode()}
    for name, parts in case["read"].items():
        address, size = at[name]
        result[name] = b"".join(ctypes.string_at(address + o, n) for o, n in parts or [(0, size)])
    for name, (address, _) in at.items():
        if not isinstance(case["buffers"][name], dict):
            libc.free(address - case["shift"].get(name, 0))
    return result


def main():
    path, cases = pickle.load(sys.stdin.buffer)
    library = ctypes.CDLL(path)
    library.cuda_host_setup.argtypes = [ctypes.c_uint64, ctypes.c_int64, ctypes.c_int64]
    library.cuda_host_error.restype = ctypes.c_char_p
    out = sys.stdout.buffer
    for case in cases:
        pickle.dump(run(library, case), out)
        out.flush()


main()
