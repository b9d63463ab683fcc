//! The bundle: one ustar archive (POSIX.1-1988) with the configuration and
//! all images, which the loaders hand to the hypervisor as one piece.
//!
//! Its first file is `MANIFEST`, a text with one line for each following file:
//! CRC-32 in hexadecimal, size in bytes, name. A medium with a bad block, or
//! an image half written, is thus told by the name of the file that suffered.

use std::fmt::Write;

/// A name is at most so long: the name field of a ustar header.
pub const MAX_NAME: usize = 100;

/// Packs `files` (name, content) behind their manifest.
///
/// The same files give the same bytes: no times, owners or modes of the host.
///
/// # Panics
/// When a name is longer than [`MAX_NAME`] bytes, or holds a control character.
#[must_use]
pub fn build_bundle(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut manifest = String::new();
    for (name, content) in files {
        let crc = crc32fast::hash(content);
        writeln!(manifest, "{crc:08x} {} {name}", content.len()).expect("a String takes all text");
    }
    let mut archive = tar::Builder::new(Vec::new());
    let all = files
        .iter()
        .map(|(name, content)| (name.as_str(), content.as_slice()));
    for (name, content) in [("MANIFEST", manifest.as_bytes())].into_iter().chain(all) {
        assert!(
            !name.is_empty() && name.len() <= MAX_NAME && !name.contains(char::is_control),
            "{name:?} cannot be a name in a bundle: 1 to {MAX_NAME} bytes, no control characters"
        );
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_cksum();
        archive
            .append(&header, content)
            .expect("a Vec takes all bytes");
    }
    archive.into_inner().expect("a Vec takes all bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_tar_with_its_manifest_first() {
        let files = [
            ("tessera.toml".to_owned(), b"[[vm]]\n".to_vec()),
            ("vm linuz".to_owned(), vec![7; 1000]),
            ("empty".to_owned(), vec![]),
        ];
        let bundle = build_bundle(&files);
        assert_eq!(bundle.len() % 512, 0);
        assert_eq!(&bundle[257..263], b"ustar\0");
        assert_eq!(bundle, build_bundle(&files));

        let mut archive = tar::Archive::new(bundle.as_slice());
        let found: Vec<(String, Vec<u8>)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let name = entry.path().unwrap().to_str().unwrap().to_owned();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                (name, content)
            })
            .collect();
        let manifest = format!(
            "{:08x} 7 tessera.toml\n{:08x} 1000 vm linuz\n00000000 0 empty\n",
            crc32fast::hash(b"[[vm]]\n"),
            crc32fast::hash(&[7; 1000]),
        );
        assert_eq!(found[0], ("MANIFEST".to_owned(), manifest.into_bytes()));
        assert_eq!(found[1..], files);
    }

    #[test]
    #[should_panic(expected = "1 to 100 bytes")]
    fn a_name_that_does_not_fit() {
        let _ = build_bundle(&[("x".repeat(101), vec![])]);
    }
}
