//! The Linux guest: Debian's cloud kernel, byte for byte, and an initramfs around Debian's static
//! busybox.
//!
//! Both packages are downloaded with `apt-get download` and unpacked below the target directory;
//! nothing is installed. The initramfs is a cpio archive in the "newc" format (Linux,
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages::{self, has_apt, run};
use crate::progress::step;
use crate::toolchain::Workspace;

/// The package whose dependency is the kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
/// The package with the guest's whole userspace.
const BUSYBOX: &str = "busybox-static";
/// The kernel's modules that go with it, in the order in which they are loaded. They are in
/// `/lib/modules`; the first process loads those of virtio.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/char/hw_random/virtio-rng.ko",
    "drivers/char/virtio_console.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "drivers/net/macvlan.ko",
    "drivers/watchdog/watchdog.ko",
    "drivers/watchdog/wdat_wdt.ko",
];
/// What runs in the guest as process 1.
const INIT: &str = include_str!("init.sh");
/// What sets an address that DHCP brought.
const LEASE: &str = include_str!("udhcpc.sh");

/// The parts of the Linux guest.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The bzImage.
    pub kernel: PathBuf,
    /// What `uname -r` says in it.
    pub release: String,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Gets the kernel and makes the initramfs, once.
pub fn prepare(workspace: &Workspace) -> Result<Linux> {
    let dir = workspace.dir("linux")?;
    let (kernel, release) = match find_kernel(&dir) {
        Some(found) => found,
        None => {
            let package = kernel_package()?;
            download(&dir, &package)?;
            find_kernel(&dir).with_context(|| format!("{package} holds no boot/vmlinuz-*"))?
        }
    };
    let busybox = dir.join("unpacked").join(BUSYBOX);
    let find_busybox = || {
        ["bin/busybox", "usr/bin/busybox"]
            .map(|p| busybox.join(p))
            .into_iter()
            .find(|p| p.is_file())
    };
    if find_busybox().is_none() {
        download(&dir, BUSYBOX)?;
    }
    let busybox = find_busybox().with_context(|| format!("{BUSYBOX} holds no bin/busybox"))?;
    let busybox = fs::read(&busybox).with_context(|| format!("reading {}", busybox.display()))?;
    let mut modules = Vec::new();
    if let Some(package) = kernel.parent().and_then(Path::parent) {
        for module in MODULES {
            let path = package.join("lib/modules").join(&release).join("kernel");
            let path = path.join(module);
            let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            let name = module.rsplit('/').next().unwrap_or(module);
            modules.push((format!("lib/modules/{name}"), bytes));
        }
    }
    let initrd = dir.join("initrd.cpio");
    let bytes = initramfs(&busybox, INIT, &modules);
    if fs::read(&initrd).ok().as_deref() != Some(&bytes) {
        fs::write(&initrd, &bytes).with_context(|| format!("writing {}", initrd.display()))?;
    }
    Ok(Linux {
        kernel,
        release,
        initrd,
    })
}

fn find_kernel(dir: &Path) -> Option<(PathBuf, String)> {
    let packages = fs::read_dir(dir.join("unpacked")).ok()?;
    packages.flatten().find_map(|package| {
        let mut files = fs::read_dir(package.path().join("boot")).ok()?.flatten();
        files.find_map(|file| {
            let name = file.file_name().into_string().ok()?;
            Some((file.path(), name.strip_prefix("vmlinuz-")?.to_owned()))
        })
    })
}

/// The package that `linux-image-cloud-amd64` stands for at present.
fn kernel_package() -> Result<String> {
    if !has_apt() {
        bail!(
            "the Linux guest is Debian's {KERNEL}, and this machine has no apt-get to download it; \
             give a configuration with a kernel of your own: cargo xtask run --config FILE"
        );
    }
    let ask = || -> Option<String> {
        let output = Command::new("apt-cache")
            .args(["depends", KERNEL])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut depends = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        depends
            .find(|p| p.starts_with("linux-image-"))
            .map(str::to_owned)
    };
    if let Some(package) = ask() {
        return Ok(package);
    }
    packages::refresh()?;
    ask().with_context(|| format!("apt-cache knows no {KERNEL}: is this Debian on x86_64?"))
}

/// Downloads and unpacks one package into `dir/unpacked/<package>`.
fn download(dir: &Path, package: &str) -> Result<()> {
    let packed = dir.join("packed").join(package);
    fs::create_dir_all(&packed).with_context(|| format!("creating {}", packed.display()))?;
    let deb = || {
        let files = fs::read_dir(&packed).ok()?;
        files
            .flatten()
            .map(|f| f.path())
            .find(|p| p.extension().is_some_and(|e| e == "deb"))
    };
    if deb().is_none() {
        let get = || {
            let mut apt = Command::new("apt-get");
            // Without this apt complains that its sandbox user may not write here.
            apt.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]);
            apt.current_dir(&packed);
            step(&format!("apt-get download {package}"), |_| run(apt))
        };
        if let Err(first) = get() {
            packages::refresh().with_context(|| format!("{first:#}"))?;
            get()?;
        }
    }
    let deb = deb().with_context(|| format!("apt-get downloaded no file for {package}"))?;
    let whole = dir.join("unpacked").join(package);
    let partial = dir.join("unpacked").join(format!("{package}.partial"));
    let _ = fs::remove_dir_all(&partial);
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&deb).arg(&partial);
    fs::create_dir_all(dir.join("unpacked"))?;
    step(&format!("unpacking {package}"), |_| run(unpack))?;
    let _ = fs::remove_dir_all(&whole);
    fs::rename(&partial, &whole).with_context(|| format!("renaming {}", partial.display()))
}

/// An initramfs with busybox, `init` and other files in `/lib/modules`.
fn initramfs(busybox: &[u8], init: &str, modules: &[(String, Vec<u8>)]) -> Vec<u8> {
    const DIR: u32 = 0o040755;
    const FILE: u32 = 0o100644;
    const PROGRAM: u32 = 0o100755;
    const CONSOLE: u32 = 0o020_600;
    let mut cpio = Cpio::default();
    for dir in [
        "bin",
        "dev",
        "etc",
        "lib",
        "lib/modules",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
    ] {
        cpio.entry(dir, DIR, (0, 0), b"");
    }
    // Process 1 gets this as its standard streams before it can mount /dev.
    cpio.entry("dev/console", CONSOLE, (5, 1), b"");
    cpio.entry("bin/busybox", PROGRAM, (0, 0), busybox);
    cpio.entry("init", PROGRAM, (0, 0), init.as_bytes());
    cpio.entry("etc/udhcpc.sh", PROGRAM, (0, 0), LEASE.as_bytes());
    for (name, module) in modules {
        cpio.entry(name, FILE, (0, 0), module);
    }
    cpio.finish()
}

/// A writer of cpio archives in the "newc" format, with fixed times, so that the same input gives
/// the same bytes.
#[derive(Default)]
struct Cpio {
    out: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), data: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o170000 == 0o040000 { 2 } else { 1 };
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            u32::try_from(data.len()).unwrap_or(u32::MAX),
            0,
            0,
            major,
            minor,
            u32::try_from(name.len() + 1).unwrap_or(u32::MAX),
            0,
        ];
        self.out.extend(b"070701");
        for field in fields {
            self.out.extend(format!("{field:08x}").bytes());
        }
        self.out.extend(name.bytes());
        self.out.push(0);
        self.pad();
        self.out.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), b"");
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_the_kernel_reads() {
        let archive = initramfs(b"\x7fELF", "#!/bin/busybox sh\n", &[]);
        let text = String::from_utf8_lossy(&archive);
        assert!(text.starts_with("070701"));
        assert_eq!(archive.len() % 4, 0);
        let at = text.find("dev/console").expect("the console's node");
        // Device numbers are the tenth and eleventh field; the name follows the thirteenth.
        assert_eq!(text.get(at - 32..at - 16), Some("0000000500000001"));
        assert!(text.contains("TRAILER!!!"));
    }
}
