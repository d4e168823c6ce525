"""A newc cpio writer: the initramfs is made without root and without any tool.

Several archives may follow each other in one initramfs (Linux unpacks them in order), so the
large part that never changes is kept compressed and the packages under test are appended.
"""

import stat
from typing import IO


class CpioWriter:
    """Write one newc archive to a binary file; parent folders are made when first needed."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._inode = 0
        self._seen: set[str] = set()

    def _entry(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        fields = (
            self._inode,
            mode,
            0,  # uid
            0,  # gid
            1,  # links
            0,  # modification time
            len(data),
            0,
            0,  # device of the archive
            device[0],
            device[1],
            len(name),
            0,  # checksum, unused in this flavour
        )
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        head = header + name
        self._out.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    def _parents(self, path: str) -> None:
        parts = path.split("/")[:-1]
        for end in range(1, len(parts) + 1):
            self.directory("/".join(parts[:end]))

    def directory(self, path: str) -> None:
        """Add a folder once."""
        if path not in self._seen:
            self._seen.add(path)
            self._entry(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file and the folders above it; the first of two of one name stays."""
        if path not in self._seen:
            self._parents(path)
            self._seen.add(path)
            self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        if path not in self._seen:
            self._parents(path)
            self._seen.add(path)
            self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """Add a device node; a cpio archive may name one without the right to make it."""
        self._parents(path)
        self._entry(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def close(self) -> None:
        """Write the trailer; the file stays open."""
        self._entry("TRAILER!!!", 0, b"")
        self._out.write(bytes(-self._out.tell() % 512))
