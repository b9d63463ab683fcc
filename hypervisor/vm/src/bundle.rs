//! The bundle: one ustar archive (POSIX.1-1988) with the configuration and all images.
//!
//! Its first file is `MANIFEST`, one line `crc32-hex size name` for each file that follows, so
//! that damage is noticed and put down to a file: a bad block on a USB stick costs the VM whose
//! image it hit, with an error that says so, and not the others.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};
use core::sync::atomic::{
    AtomicU32, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::load::Image;

/// The first file of a bundle.
pub const MANIFEST: &str = "MANIFEST";
/// The configuration.
pub const CONFIGURATION: &str = "tessera.toml";

const BLOCK: usize = 512;

/// The checksum of a file in `MANIFEST`: that of zip and Ethernet (reflected 0x04c1_1db7), of what
/// comes after data with the sum `before` (0: nothing). Its table has 1 KiB; faster ways take 16 of
/// the image for a fraction of a second at boot.
fn crc32(before: u32, data: &[u8]) -> u32 {
    static CRC32: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
    let mut digest = CRC32.digest_with_initial((!before).reverse_bits());
    digest.update(data);
    digest.finalize()
}

/// What is wrong with a bundle or a file in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// Nothing there.
    #[error("the bundle is empty: no archive was handed over at boot")]
    Empty,
    /// It does not begin with a `MANIFEST`.
    #[error("this is no bundle: it begins with {found}, not with a ustar entry `MANIFEST`")]
    NotABundle {
        /// The first entry or bytes.
        found: String,
    },
    /// An entry's header is damaged; what follows cannot be found.
    #[error("corrupt bundle: the entry header at offset {offset:#x} {why}")]
    Header {
        /// Where in the archive.
        offset: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A manifest line is malformed.
    #[error("corrupt bundle: line {line} of MANIFEST is not `crc32 size name`")]
    Manifest {
        /// Line, from 1.
        line: usize,
    },
    /// The archive ends inside a file.
    #[error("truncated bundle: `{name}` has {have} of its {size} bytes; write the image again")]
    Truncated {
        /// The file.
        name: String,
        /// Its size by its header.
        size: u64,
        /// What is there.
        have: usize,
    },
    /// No such file, in the manifest or after it.
    #[error("`{name}` is not in the bundle; it holds {}", .held.join(", "))]
    NotFound {
        /// As asked for.
        name: String,
        /// What the manifest lists.
        held: Vec<String>,
    },
    /// The manifest lists it, the archive ended before it.
    #[error(
        "truncated bundle: `{name}` is missing, though MANIFEST lists it; write the image again"
    )]
    Lost {
        /// As asked for.
        name: String,
    },
    /// The manifest and the archive disagree about its size.
    #[error("corrupt bundle: `{name}` has {found} bytes, but MANIFEST says {listed}")]
    Size {
        /// The file.
        name: String,
        /// By the manifest.
        listed: u64,
        /// By the archive.
        found: usize,
    },
    /// The contents are not what was packed.
    #[error(
        "corrupt bundle: `{name}` has CRC {found:08x}, but MANIFEST says {listed:08x}; write the image again"
    )]
    Corrupt {
        /// The file.
        name: String,
        /// By the manifest.
        listed: u32,
        /// Computed.
        found: u32,
    },
    /// Text is not UTF-8.
    #[error("`{name}` is not UTF-8 text: bad byte at offset {offset:#x}")]
    NotText {
        /// The file.
        name: String,
        /// The first bad byte.
        offset: usize,
    },
}

struct Listed<'a> {
    name: &'a str,
    crc: u32,
    size: u64,
    /// How much of it was summed up, and the sum. A file that is summed up is not read again.
    summed: AtomicUsize,
    sum: AtomicU32,
}

impl Listed<'_> {
    fn check(&self, data: &[u8], piece: usize) -> Result<bool, BundleError> {
        let at = self.summed.load(Acquire);
        let rest = data.get(at..).unwrap_or_default();
        let now = rest.get(..piece).unwrap_or(rest);
        let sum = crc32(self.sum.load(Relaxed), now);
        self.sum.store(sum, Relaxed);
        self.summed.store(at + now.len(), Release);
        if now.len() < rest.len() {
            return Ok(false);
        }
        if sum != self.crc {
            return Err(BundleError::Corrupt {
                name: self.name.to_owned(),
                listed: self.crc,
                found: sum,
            });
        }
        Ok(true)
    }
}

/// An open bundle. Opening reads headers and the manifest; a file's contents are checked when it
/// is first asked for.
pub struct Bundle<'a> {
    listed: Vec<Listed<'a>>,
    files: Vec<(String, &'a [u8])>,
    damage: Option<BundleError>,
}

impl<'a> Bundle<'a> {
    /// Opens an archive. Damage behind the manifest does not fail this: it fails [`Bundle::get`]
    /// for the files it hides, and is told by [`Bundle::damage`].
    ///
    /// # Errors
    /// There is no intact manifest.
    pub fn open(archive: &'a [u8]) -> Result<Self, BundleError> {
        if archive.iter().take(BLOCK).all(|byte| *byte == 0) {
            return Err(BundleError::Empty);
        }
        let mut entries = Entries { archive, offset: 0 };
        let found = |name: &str| BundleError::NotABundle {
            found: name.to_owned(),
        };
        let manifest = match entries.next() {
            Some(Ok((name, data))) if name == MANIFEST => data,
            Some(Ok((name, _))) => return Err(found(&format!("the file `{name}`"))),
            Some(Err(truncated @ BundleError::Truncated { .. })) => return Err(truncated),
            _ => {
                return Err(found(&format!(
                    "{:02x?}",
                    archive.get(..8).unwrap_or(archive)
                )));
            }
        };
        let manifest = text(MANIFEST, manifest)?;
        let listed = manifest
            .lines()
            .enumerate()
            .map(|(index, line)| {
                let malformed = BundleError::Manifest { line: index + 1 };
                let mut words = line.splitn(3, ' ');
                let crc = words
                    .next()
                    .and_then(|word| u32::from_str_radix(word, 16).ok());
                let size = words.next().and_then(|word| word.parse().ok());
                match (crc, size, words.next()) {
                    (Some(crc), Some(size), Some(name)) if !name.is_empty() => Ok(Listed {
                        name,
                        crc,
                        size,
                        summed: AtomicUsize::new(0),
                        sum: AtomicU32::new(0),
                    }),
                    _ => Err(malformed),
                }
            })
            .collect::<Result<_, _>>()?;
        let mut files = Vec::new();
        let mut damage = None;
        for entry in entries {
            match entry {
                Ok(file) => files.push(file),
                Err(error) => damage = Some(error),
            }
        }
        Ok(Self {
            listed,
            files,
            damage,
        })
    }

    /// The first damage found behind the manifest, which hides what follows it.
    #[must_use]
    pub fn damage(&self) -> Option<&BundleError> {
        self.damage.as_ref()
    }

    /// A file's contents, as they were packed.
    ///
    /// # Errors
    /// It is not there, or not intact.
    pub fn get(&self, name: &str) -> Result<&'a [u8], BundleError> {
        self.image(name).map(|image| image.data)
    }

    /// As [`Bundle::get`], with the name as the manifest has it.
    ///
    /// # Errors
    /// As [`Bundle::get`].
    pub fn image(&self, name: &str) -> Result<Image<'a>, BundleError> {
        let (listed, data) = self.find(name)?;
        listed.check(data, usize::MAX)?;
        Ok(Image {
            name: listed.name,
            data,
        })
    }

    /// Checks the next `piece` bytes of a file; `true` once it is known to be intact, which is
    /// remembered. For one core at a time.
    ///
    /// # Errors
    /// As [`Bundle::get`].
    pub fn check(&self, name: &str, piece: usize) -> Result<bool, BundleError> {
        let (listed, data) = self.find(name)?;
        listed.check(data, piece)
    }

    /// A file's line in the manifest, and its contents.
    fn find(&self, name: &str) -> Result<(&Listed<'a>, &'a [u8]), BundleError> {
        let Some(listed) = self.listed.iter().find(|listed| listed.name == name) else {
            let held = self
                .listed
                .iter()
                .map(|listed| format!("`{}`", listed.name))
                .collect();
            return Err(BundleError::NotFound {
                name: name.to_owned(),
                held,
            });
        };
        let Some((_, data)) = self.files.iter().find(|(file, _)| file == name) else {
            let lost = BundleError::Lost {
                name: name.to_owned(),
            };
            return Err(match &self.damage {
                Some(BundleError::Truncated { name: cut, .. }) if cut != name => lost,
                Some(damage) => damage.clone(),
                None => lost,
            });
        };
        if data.len() as u64 != listed.size {
            let (name, found) = (name.to_owned(), data.len());
            return Err(BundleError::Size {
                name,
                listed: listed.size,
                found,
            });
        }
        Ok((listed, data))
    }

    /// A file that holds text, such as the configuration.
    ///
    /// # Errors
    /// As [`Bundle::get`]; or it is not UTF-8.
    pub fn get_text(&self, name: &str) -> Result<&'a str, BundleError> {
        text(name, self.get(name)?)
    }
}

fn text<'a>(name: &str, data: &'a [u8]) -> Result<&'a str, BundleError> {
    core::str::from_utf8(data).map_err(|error| BundleError::NotText {
        name: name.to_owned(),
        offset: error.valid_up_to(),
    })
}

/// Walks an archive's entries; ends after the first error.
struct Entries<'a> {
    archive: &'a [u8],
    offset: usize,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<(String, &'a [u8]), BundleError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let offset = self.offset;
            let rest = self.archive.get(offset..).filter(|rest| !rest.is_empty())?;
            // Until the entry proves well formed, it is the last one.
            self.offset = usize::MAX;
            let bad = |why| Some(Err(BundleError::Header { offset, why }));
            let Some((header, body)) = rest.split_first_chunk::<BLOCK>() else {
                return bad("is cut off");
            };
            if header.iter().all(|byte| *byte == 0) {
                return None;
            }
            let entry = match Header::parse(header) {
                Ok(entry) => entry,
                Err(why) => return bad(why),
            };
            let data = usize::try_from(entry.size)
                .ok()
                .and_then(|size| body.get(..size));
            let Some(data) = data else {
                let Header { name, size, .. } = entry;
                return Some(Err(BundleError::Truncated {
                    name,
                    size,
                    have: body.len(),
                }));
            };
            // `data` fits into memory, so the sum cannot overflow.
            self.offset = offset + BLOCK + data.len().next_multiple_of(BLOCK);
            match entry.kind {
                b'0' | 0 => return Some(Ok((entry.name, data))),
                b'5' => {}
                _ => return bad("is of a kind that a bundle does not have (only plain files)"),
            }
        }
    }
}

struct Header {
    name: String,
    size: u64,
    kind: u8,
}

impl Header {
    fn parse(header: &[u8; BLOCK]) -> Result<Self, &'static str> {
        if &header[257..262] != b"ustar" {
            return Err("lacks the mark `ustar`");
        }
        if octal(&header[148..156]) != Some(u64::from(checksum(header))) {
            return Err("has a wrong checksum");
        }
        let size = octal(&header[124..136]).ok_or("has no octal size")?;
        let field = |bytes: &'static str, field| string(field).ok_or(bytes);
        let mut name = field("has a name that is not UTF-8", &header[..100])?.to_owned();
        // GNU's variant of the mark (`ustar  `) uses these bytes for something else.
        if header[262] == 0 {
            let prefix = field("has a name that is not UTF-8", &header[345..500])?;
            if !prefix.is_empty() {
                name = format!("{prefix}/{name}");
            }
        }
        Ok(Self {
            name,
            size,
            kind: header[156],
        })
    }
}

/// The sum of all bytes, those of the checksum field taken as spaces.
fn checksum(header: &[u8; BLOCK]) -> u32 {
    let field = 148..156;
    header
        .iter()
        .enumerate()
        .map(|(i, byte)| u32::from(if field.contains(&i) { b' ' } else { *byte }))
        .sum()
}

fn string(field: &[u8]) -> Option<&str> {
    core::str::from_utf8(field.split(|byte| *byte == 0).next()?).ok()
}

fn octal(field: &[u8]) -> Option<u64> {
    u64::from_str_radix(string(field)?.trim(), 8).ok()
}

/// Packs files into a bundle, the manifest first.
///
/// # Errors
/// The name of the first file whose name is empty, longer than a ustar header can hold, or not
/// fit for a manifest line; or whose size is 8 GiB or more.
pub fn pack(files: &[(&str, &[u8])]) -> Result<Vec<u8>, String> {
    let mut manifest = String::new();
    for (name, data) in files {
        manifest += &format!("{:08x} {} {name}\n", crc32(0, data), data.len());
    }
    let mut archive = Vec::new();
    for (name, data) in [(MANIFEST, manifest.as_bytes())].iter().chain(files) {
        let header = header(name, data.len()).ok_or_else(|| name.to_string())?;
        archive.extend_from_slice(&header);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }
    archive.resize(archive.len() + 2 * BLOCK, 0);
    Ok(archive)
}

fn header(name: &str, size: usize) -> Option<[u8; BLOCK]> {
    if name.is_empty() || name.contains(char::is_control) || size as u64 >= 1 << 33 {
        return None;
    }
    let (prefix, file) = if name.len() <= 100 {
        ("", name)
    } else {
        let cut = name
            .match_indices('/')
            .map(|(at, _)| at)
            .find(|at| name.len() - at - 1 <= 100);
        let (prefix, file) = name.split_at(cut?);
        (prefix, file.get(1..)?)
    };
    if prefix.len() > 155 || file.is_empty() {
        return None;
    }
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, file.as_bytes());
    put(100, b"0000644\x000000000\x000000000\0");
    put(124, format!("{size:011o}\x0000000000000\0").as_bytes());
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(345, prefix.as_bytes());
    let sum = checksum(&header);
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(header)
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    const LONG: &str = concat!(
        "images/a-directory-with-a-name-that-takes-a-good-part-of-the-hundred-bytes-of-the-name-field/",
        "vmlinuz-6.1.0-18-cloud-amd64"
    );

    fn sample() -> Vec<u8> {
        pack(&[
            (CONFIGURATION, b"[host]\n"),
            ("kernel", &[0x90; 1000]),
            (LONG, b"long"),
        ])
        .unwrap()
    }

    #[test]
    fn what_was_packed_is_found() {
        let archive = sample();
        let bundle = Bundle::open(&archive).unwrap();
        assert_eq!(bundle.get_text(CONFIGURATION).unwrap(), "[host]\n");
        assert_eq!(bundle.get("kernel").unwrap(), [0x90; 1000]);
        assert_eq!(bundle.get(LONG).unwrap(), b"long");
        assert_eq!(bundle.damage(), None);
        assert_eq!(
            bundle.get("kernal").unwrap_err().to_string(),
            format!("`kernal` is not in the bundle; it holds `tessera.toml`, `kernel`, `{LONG}`")
        );
    }

    #[test]
    fn names_that_do_not_fit_are_not_packed() {
        for name in [
            "",
            "a\nb",
            &"x".repeat(101),
            &format!("{}/x", "y".repeat(156)),
        ] {
            assert_eq!(pack(&[(name, b"")]), Err(name.to_owned()));
        }
    }

    /// Where the contents of the sample's files begin: a header in front of each.
    const CONFIGURATION_AT: usize = 3 * BLOCK;
    const KERNEL_AT: usize = 5 * BLOCK;

    #[test]
    fn damage_is_put_down_to_its_file() {
        let error = |damage: &dyn Fn(&mut Vec<u8>), name| {
            let mut archive = sample();
            damage(&mut archive);
            let bundle = Bundle::open(&archive).unwrap();
            bundle.get(CONFIGURATION).unwrap();
            bundle.get(name).unwrap_err().to_string()
        };
        let crc = crc32(0, &[0x90; 1000]);
        let flipped = error(&|archive| archive[KERNEL_AT + 5] ^= 1, "kernel");
        assert!(
            flipped.starts_with("corrupt bundle: `kernel` has CRC "),
            "{flipped}"
        );
        assert!(
            flipped.contains(&format!("MANIFEST says {crc:08x}")),
            "{flipped}"
        );
        assert_eq!(
            error(&|archive| archive.truncate(KERNEL_AT + 700), "kernel"),
            "truncated bundle: `kernel` has 700 of its 1000 bytes; write the image again"
        );
        assert_eq!(
            error(&|archive| archive.truncate(KERNEL_AT + 700), LONG),
            format!(
                "truncated bundle: `{LONG}` is missing, though MANIFEST lists it; write the image again"
            )
        );
        assert_eq!(
            error(&|archive| archive[KERNEL_AT - BLOCK] ^= 1, "kernel"),
            "corrupt bundle: the entry header at offset 0x800 has a wrong checksum"
        );
        let manifest = format!("{crc:08x} 1000 kernel");
        let at = |archive: &[u8]| {
            archive
                .windows(manifest.len())
                .position(|bytes| bytes == manifest.as_bytes())
                .unwrap()
        };
        assert_eq!(
            error(
                &|archive| {
                    let at = at(archive) + 9;
                    archive[at] = b'2'
                },
                "kernel"
            ),
            "corrupt bundle: `kernel` has 1000 bytes, but MANIFEST says 2000"
        );
    }

    #[test]
    fn what_is_no_bundle_is_not_opened() {
        let open = |archive: &[u8]| Bundle::open(archive).err().unwrap().to_string();
        assert_eq!(
            open(&[]),
            "the bundle is empty: no archive was handed over at boot"
        );
        assert_eq!(
            open(&[0; 4096]),
            "the bundle is empty: no archive was handed over at boot"
        );
        assert_eq!(
            open(&[7; 4096]),
            "this is no bundle: it begins with [07, 07, 07, 07, 07, 07, 07, 07], \
             not with a ustar entry `MANIFEST`"
        );
        assert!(
            open(&sample()[CONFIGURATION_AT - BLOCK..]).contains("with the file `tessera.toml`")
        );
        assert!(open(&sample()[..BLOCK + 3]).starts_with("truncated bundle: `MANIFEST` has 3 of"));
        let mut bad = sample();
        bad[BLOCK] = b'x';
        assert_eq!(
            open(&bad),
            "corrupt bundle: line 1 of MANIFEST is not `crc32 size name`"
        );
    }

    /// A damaged archive gives either an error or exactly what was packed.
    #[test]
    fn a_file_is_checked_in_pieces_and_once() {
        let archive = sample();
        let bundle = Bundle::open(&archive).unwrap();
        let pieces = (1..).find(|_| bundle.check("kernel", 300).unwrap());
        assert_eq!(pieces, Some(4));
        assert!(bundle.check("kernel", 0).unwrap());
        // One that was begun with is finished by who wants it.
        assert!(!bundle.check(LONG, 1).unwrap());
        assert_eq!(bundle.get(LONG).unwrap(), b"long");
        assert_eq!(bundle.listed[1].summed.load(Relaxed), 1000);

        let mut damaged = sample();
        let at = damaged.iter().rposition(|byte| *byte == 0x90).unwrap();
        damaged[at] = 0x91;
        let bundle = Bundle::open(&damaged).unwrap();
        assert_eq!(bundle.check("kernel", 999), Ok(false));
        let error = bundle.check("kernel", 999).unwrap_err();
        assert!(matches!(error, BundleError::Corrupt { .. }));
        // Again and again.
        assert_eq!(bundle.check("kernel", 999), Err(error.clone()));
        assert_eq!(bundle.get("kernel"), Err(error));
        assert!(bundle.check("kernal", 1).is_err());
    }

    #[test]
    fn damage_is_never_silent() {
        let mut random = crate::testing::Random::new(3);
        for _ in 0..20_000 {
            let mut archive = sample();
            let length = archive.len() as u64;
            random.damage(&mut archive, 0, length);
            let Ok(bundle) = Bundle::open(&archive) else {
                continue;
            };
            for (name, data) in [
                (CONFIGURATION, &b"[host]\n"[..]),
                ("kernel", &vec![0x90; 1000]),
                (LONG, b"long"),
            ] {
                if let Ok(found) = bundle.get(name) {
                    assert_eq!(found, data);
                }
            }
        }
    }
}
