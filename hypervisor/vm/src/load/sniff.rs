//! What a file looks like, for the error that says it is something else.

use core::fmt;

use super::{elf, linux, multiboot};
use crate::config::Kind;

/// What a file seems to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Looks {
    /// In words.
    pub text: &'static str,
    /// The kind that would load it.
    pub kind: Option<Kind>,
}

impl fmt::Display for Looks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text)
    }
}

/// Looks at a file's first bytes and headers.
#[must_use]
pub fn sniff(data: &[u8]) -> Looks {
    let looks = |text, kind| Looks { text, kind };
    if data.is_empty() {
        return looks("an empty file", None);
    }
    if linux::has_magic(data) {
        return looks("a Linux bzImage", Some(Kind::Linux));
    }
    let multiboot = multiboot::find_header(data).is_some();
    if data.starts_with(elf::MAGIC) {
        let pvh = elf::Elf::parse(data).is_ok_and(|elf| elf.pvh_entry().is_some());
        return match (pvh, multiboot) {
            (true, _) => looks("an ELF with a PVH entry note", Some(Kind::Pvh)),
            (_, true) => looks("an ELF with a multiboot header", Some(Kind::Multiboot)),
            _ => looks("an ELF without a PVH note or a multiboot header", None),
        };
    }
    if multiboot {
        return looks(
            "a flat image with a multiboot header",
            Some(Kind::Multiboot),
        );
    }
    const MARKS: [(&[u8], &str); 9] = [
        (b"MZ", "a PE executable (an EFI application?)"),
        (b"\x1f\x8b", "gzip-compressed data"),
        (b"\xfd7zXZ\0", "xz-compressed data"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
        (b"BZh", "bzip2-compressed data"),
        (b"070701", "a cpio archive (an initrd?)"),
        (b"!<arch>\n", "an ar archive (a Debian package?)"),
        (b"\xeb\x63\x90", "a disk image"),
        (b"#!", "a script"),
    ];
    if let Some((_, text)) = MARKS.iter().find(|(mark, _)| data.starts_with(mark)) {
        return looks(text, None);
    }
    let head = data.get(..256).unwrap_or(data);
    if head.iter().all(|byte| *byte == 0) {
        return looks("all zeroes at its start", None);
    }
    if head
        .iter()
        .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
    {
        return looks("a text file", None);
    }
    looks("data of no known format", None)
}
