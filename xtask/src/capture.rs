//! Captured frames on the console: lines of `tessera| pcap SWITCH BASE64`, which put together are a
//! pcap file. They are taken out of what a person sees and put into files.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::progress::note;

/// What begins such a line. No guest can write it: the mark is the log's alone.
const MARK: &[u8] = b"tessera| pcap ";
/// A line is not longer.
const LONGEST: usize = 1024;
/// What a pcap file begins with: a new one.
const MAGIC: [u8; 4] = [0x4d, 0x3c, 0xb2, 0xa1];

/// A file that is being written.
struct Written {
    switch: String,
    path: PathBuf,
    file: File,
    frames: u64,
}

/// The files of a run.
pub struct Captures<'a> {
    dir: &'a Path,
    /// The beginning of a line that may be one of ours, or is.
    held: Vec<u8>,
    /// How much of it was seen all the same.
    seen: usize,
    /// The line is somebody else's.
    other: bool,
    files: Vec<Written>,
    /// Something did not work, and was told.
    failed: bool,
}

impl<'a> Captures<'a> {
    /// Files are to be made in `dir`.
    pub fn new(dir: &'a Path) -> Self {
        Self {
            dir,
            held: Vec::new(),
            seen: 0,
            other: false,
            files: Vec::new(),
            failed: false,
        }
    }

    /// Takes what came from the console; gives what is for a person.
    pub fn pass(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for &byte in bytes {
            if self.other {
                out.push(byte);
                self.other = byte != b'\n';
                continue;
            }
            let place = self.held.len();
            if place == 0 && byte == b'\r' {
                // Behind a line feed alone the line begins with it.
                out.push(byte);
                continue;
            }
            let fits = MARK.get(place).is_none_or(|mark| *mark == byte);
            self.held.push(byte);
            if !fits || place > LONGEST {
                out.extend(self.held.drain(..).skip(self.seen));
                (self.seen, self.other) = (0, byte != b'\n');
            } else if byte == b'\n' {
                let line = std::mem::take(&mut self.held);
                self.seen = 0;
                if let Some(told) = self.take(&line) {
                    out.extend(format!("xtask: {told}\r\n").bytes());
                }
            }
        }
        out
    }

    /// Whether something is kept back that may well be for a person.
    pub fn waits(&self) -> bool {
        (self.seen + 1..MARK.len()).contains(&self.held.len())
    }

    /// Gives that, when nothing has come behind it for a while.
    pub fn show(&mut self) -> Vec<u8> {
        let waiting = self.held.get(self.seen..).unwrap_or_default().to_vec();
        self.seen = self.held.len();
        waiting
    }

    /// Takes a whole line of ours; gives what a person is to be told.
    fn take(&mut self, line: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(line.get(MARK.len()..).unwrap_or_default());
        let (switch, text) = text.trim_end().split_once(' ')?;
        // The hypervisor names switches so; the name becomes a file's.
        let sound = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let bytes = STANDARD.decode(text).ok();
        let bytes = bytes.filter(|_| switch.chars().all(sound))?;
        match self.write(switch, &bytes) {
            Ok(told) => told,
            Err(error) => {
                let first = !std::mem::replace(&mut self.failed, true);
                first.then(|| format!("captured frames of switch {switch} are lost: {error}"))
            }
        }
    }

    /// Writes a piece; says where to if it is the first.
    fn write(&mut self, switch: &str, bytes: &[u8]) -> io::Result<Option<String>> {
        if bytes.starts_with(&MAGIC) {
            let before = self
                .files
                .iter()
                .filter(|file| file.switch == switch)
                .count();
            let name = match before {
                0 => format!("{switch}.pcap"),
                _ => format!("{switch}-{}.pcap", before + 1),
            };
            let path = self.dir.join(name);
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            let told = format!("frames of switch {switch} go to {}", path.display());
            self.files.push(Written {
                switch: switch.to_owned(),
                path,
                file,
                frames: 0,
            });
            return Ok(Some(told));
        }
        let mut files = self.files.iter_mut().rev();
        if let Some(written) = files.find(|file| file.switch == switch) {
            written.file.write_all(bytes)?;
            written.frames += 1;
        }
        Ok(None)
    }

    /// Says where the files are.
    pub fn report(&self) {
        for file in &self.files {
            note(&format!(
                "{} frames are in {}",
                file.frames,
                file.path.display()
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_pcap_become_files_and_the_rest_is_seen() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut captures = Captures::new(dir.path());
        let header = STANDARD.encode([&MAGIC[..], &[0; 20]].concat());
        let said = format!(
            "~ # ls\n\rtessera| pcap lan {header}\r\ntessera| up\r\n\
             a tessera| pcap lan AAAA\r\ntessera| pcap lan AAEC\r\ntessera| pcap lan !\r\n\
             tessera| pcap ../x {header}\r\ntessera| pcap lan {header}\r\ntes"
        );
        let mut seen = Vec::new();
        for piece in said.as_bytes().chunks(7) {
            seen.extend(captures.pass(piece));
        }
        assert!(captures.waits(), "a prompt");
        seen.extend(captures.show());
        assert!(!captures.waits());
        seen.extend(captures.pass(b"s~ # "));
        let seen = String::from_utf8_lossy(&seen);
        let told = |name| {
            format!(
                "xtask: frames of switch lan go to {}\r\n",
                dir.path().join(name).display()
            )
        };
        let (first, second) = (told("lan.pcap"), told("lan-2.pcap"));
        let want =
            format!("~ # ls\n\r{first}tessera| up\r\na tessera| pcap lan AAAA\r\n{second}tess~ # ");
        assert_eq!(seen, want);
        let file = std::fs::read(dir.path().join("lan.pcap")).expect("the file");
        assert_eq!(file.len(), 24 + 3);
        assert_eq!(file.get(24..), Some(&[0, 1, 2][..]));
        let second = std::fs::read(dir.path().join("lan-2.pcap")).expect("the second file");
        assert_eq!(second.len(), 24);
        assert_eq!(captures.files.len(), 2);
    }
}
