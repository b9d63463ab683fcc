//! The disk image, which is also what goes on a USB stick: one GPT disk that
//! UEFI and BIOS machines boot.
//!
//! | where | what |
//! | --- | --- |
//! | LBA 0 | protective MBR with GRUB's `boot.img` as its boot code |
//! | partition 1, BIOS boot | GRUB's `core.img` |
//! | partition 2, EFI system, FAT32 | our UEFI loader, the multiboot2 entry, kernel, bundle, `grub.cfg` |
//!
//! GRUB installs itself only to block devices, so we do what `grub-bios-setup`
//! does to a disk: write the two images and tell each where the next sector
//! lies (GRUB's `include/grub/i386/pc/boot.h` has the offsets). The same inputs
//! give the same image, byte for byte.

use anyhow::{Context, Result, bail, ensure};
use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition_types;
use std::fs::File;
use std::io::{Cursor, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// What goes on the disk.
pub struct ImageInputs<'a> {
    /// The hypervisor's ELF file.
    pub kernel: &'a [u8],
    /// What [`build_bundle`](crate::bundle::build_bundle) made.
    pub bundle: &'a [u8],
    /// The UEFI loader's PE file.
    pub uefi_loader: &'a [u8],
    /// The multiboot2 entry's ELF file.
    pub multiboot2_stub: &'a [u8],
}

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// Where partition 1 begins, and how long it is: a MiB each.
const BIOS_BOOT: u64 = MIB;
/// Where partition 2 begins.
const ESP: u64 = 2 * MIB;
/// Behind the last partition: the second GPT, and all of a MiB for alignment.
const TAIL: u64 = MIB;
const MIN_ESP: u64 = 64 * MIB;
/// FAT32 has at least 65,525 clusters; the tables take from that.
const MIN_CLUSTERS: u64 = 66_000;

/// Debian's grub-pc-bin.
const GRUB: &str = "/usr/lib/grub/i386-pc";
const MODULES: [&str; 15] = [
    "all_video",
    "biosdisk",
    "boot",
    "cpuid",
    "echo",
    "fat",
    "halt",
    "multiboot2",
    "normal",
    "part_gpt",
    "serial",
    "sleep",
    "terminal",
    "test",
    "vbe",
];

/// GRUB says on screen and serial port why it cannot go on, and stays.
/// Without a serial port, `terminal_output` fails and the screen remains.
const GRUB_CFG: &str = r#"serial --unit=0 --speed=115200
terminfo -g 250x24 serial dumb
terminal_input console serial
terminal_output console serial
set timeout=0
set pager=0
if cpuid -l; then
  if multiboot2 /tessera/boot32; then
    if module2 /tessera/kernel; then
      if module2 /tessera/bundle; then
        boot
      fi
    fi
  fi
  echo "tessera boot: a file in /tessera on the boot disk is missing or damaged (see above), or memory is too small; write the image to the disk again"
else
  echo "tessera boot: this processor has no 64-bit long mode; Tessera needs an x86-64 machine"
fi
sleep 99999999
"#;

/// Makes the disk image `out`, a sparse file. What is there is replaced.
///
/// # Errors
/// When GRUB is not installed, an input cannot be what it should be, or
/// the file cannot be written.
pub fn build_image(inputs: ImageInputs<'_>, out: &Path) -> Result<()> {
    for (what, bytes, magic) in [
        ("kernel", inputs.kernel, &b"\x7fELF"[..]),
        ("multiboot2 entry", inputs.multiboot2_stub, b"\x7fELF"),
        ("UEFI loader", inputs.uefi_loader, b"MZ"),
    ] {
        ensure!(
            bytes.starts_with(magic),
            "the {what} ({} bytes) is no {} file",
            bytes.len(),
            if magic == b"MZ" { "PE" } else { "ELF" }
        );
    }
    let core = grub_core(BIOS_BOOT / SECTOR)?;
    let boot = read_grub("boot.img")?;
    let files = [
        ("EFI/BOOT/BOOTX64.EFI", inputs.uefi_loader),
        ("tessera/kernel", inputs.kernel),
        ("tessera/bundle", inputs.bundle),
        ("tessera/boot32", inputs.multiboot2_stub),
        ("boot/grub/grub.cfg", GRUB_CFG.as_bytes()),
    ];
    let id = files
        .iter()
        .fold(crc32fast::Hasher::new(), |mut hasher, (_, bytes)| {
            hasher.update(bytes);
            hasher
        });
    let id = id.finalize();
    let esp = esp(&files, id)?;

    let write = || -> Result<()> {
        let mut disk = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(out)?;
        let size = ESP + esp.len() as u64 + TAIL;
        disk.set_len(size)?;
        let mut mbr =
            ProtectiveMBR::with_lb_size(u32::try_from(size / SECTOR - 1).unwrap_or(u32::MAX));
        mbr.set_bootcode(boot_code(&boot, BIOS_BOOT / SECTOR)?);
        mbr.overwrite_lba0(&mut disk)?;
        partition(&mut disk, esp.len() as u64, id)?;
        disk.write_all_at(&core, BIOS_BOOT)?;
        write_sparse(&disk, &esp, ESP)?;
        disk.seek(SeekFrom::Start(0))?;
        disk.flush()?;
        Ok(())
    };
    write().with_context(|| format!("cannot write the disk image {}", out.display()))
}

/// Writes both GPTs.
fn partition(disk: &mut File, esp: u64, id: u32) -> Result<()> {
    let uuid = |number: u128| {
        uuid::Builder::from_random_bytes((number << 96 | u128::from(id)).to_be_bytes()).into_uuid()
    };
    let mut gpt = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(disk, Some(uuid(0)))?;
    for (number, name, at, len, kind) in [
        (1, "grub", BIOS_BOOT, ESP - BIOS_BOOT, partition_types::BIOS),
        (2, "tessera", ESP, esp, partition_types::EFI),
    ] {
        gpt.add_partition_at(name, number, at / SECTOR, len / SECTOR, kind, 0)?;
    }
    // The crate draws random identities.
    let mut partitions = gpt.partitions().clone();
    for (number, partition) in &mut partitions {
        partition.part_guid = uuid(u128::from(*number));
    }
    gpt.update_partitions(partitions)?;
    gpt.write()?;
    Ok(())
}

/// The EFI system partition with these files.
fn esp(files: &[(&str, &[u8])], id: u32) -> Result<Vec<u8>> {
    let content: u64 = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let size = (content + content / 64 + 8 * MIB)
        .next_multiple_of(MIB)
        .max(MIN_ESP);
    let cluster = (size / MIN_CLUSTERS).clamp(SECTOR, 32 * 1024);
    let cluster = 1 << cluster.ilog2();
    let mut volume = vec![0; usize::try_from(size)?];
    let options = fatfs::FormatVolumeOptions::new()
        .fat_type(fatfs::FatType::Fat32)
        .bytes_per_cluster(cluster)
        .volume_id(id)
        .volume_label(*b"TESSERA    ");
    fatfs::format_volume(Cursor::new(volume.as_mut_slice()), options)
        .context("cannot format the EFI system partition")?;
    {
        let fs =
            fatfs::FileSystem::new(Cursor::new(volume.as_mut_slice()), fatfs::FsOptions::new())?;
        for (path, bytes) in files {
            let mut dir = fs.root_dir();
            let mut names = path.split('/').peekable();
            while let Some(name) = names.next() {
                if names.peek().is_some() {
                    dir = dir.create_dir(name)?;
                } else {
                    let mut file = dir.create_file(name)?;
                    file.write_all(bytes).with_context(|| {
                        format!(
                            "{path} ({} bytes) does not fit into the EFI system partition",
                            bytes.len()
                        )
                    })?;
                }
            }
        }
        fs.unmount()?;
    }
    Ok(volume)
}

/// `boot.img` as boot code of the MBR, told where `core.img` begins.
fn boot_code(boot: &[u8], core_lba: u64) -> Result<[u8; 440]> {
    /// 8 bytes: the first sector of `core.img`.
    const KERNEL_SECTOR: usize = 0x5c;
    /// 2 bytes: a jump that makes boot.img believe DL. As grub-bios-setup does
    /// for hard disks, we let it correct BIOSes that give a wrong one.
    const DRIVE_CHECK: usize = 0x66;
    let Some(code) = boot.first_chunk::<440>() else {
        bail!("{GRUB}/boot.img is cut off; reinstall grub-pc-bin");
    };
    let mut code = *code;
    code[KERNEL_SECTOR..][..8].copy_from_slice(&core_lba.to_le_bytes());
    code[DRIVE_CHECK..][..2].copy_from_slice(&[0x90; 2]);
    Ok(code)
}

/// Makes `core.img`, told where its own second sector lies.
fn grub_core(lba: u64) -> Result<Vec<u8>> {
    /// In the first sector: where the rest begins (8 bytes), how many sectors
    /// (2), where in memory (2): the second and third were filled in already.
    const BLOCKLIST: usize = 512 - 12;
    let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
    let image = dir.path().join("core.img");
    let output = Command::new("grub-mkimage")
        .args(["-O", "i386-pc", "-d", GRUB, "-p", "(,gpt2)/boot/grub", "-o"])
        .arg(&image)
        .args(MODULES)
        .output()
        .context("cannot run grub-mkimage; install it: apt-get install grub-common grub-pc-bin")?;
    ensure!(
        output.status.success(),
        "grub-mkimage failed: {}; are grub-common and grub-pc-bin installed?",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let mut core = std::fs::read(&image).context("cannot read what grub-mkimage made")?;
    let sectors = core.len().div_ceil(SECTOR as usize) - 1;
    ensure!(
        core.len() > 512 && core.len() as u64 <= ESP - BIOS_BOOT,
        "GRUB's core.img has {} bytes and must fit into 1 MiB",
        core.len()
    );
    core[BLOCKLIST..][..8].copy_from_slice(&(lba + 1).to_le_bytes());
    core[BLOCKLIST + 8..][..2].copy_from_slice(&u16::try_from(sectors)?.to_le_bytes());
    Ok(core)
}

fn read_grub(name: &str) -> Result<Vec<u8>> {
    let path = Path::new(GRUB).join(name);
    std::fs::read(&path).with_context(|| {
        format!(
            "cannot read {}; install it: apt-get install grub-pc-bin",
            path.display()
        )
    })
}

/// Writes what is not zero; the rest of the file is a hole.
fn write_sparse(disk: &File, bytes: &[u8], at: u64) -> Result<()> {
    const CHUNK: usize = 64 * 1024;
    for (at, chunk) in (at..).step_by(CHUNK).zip(bytes.chunks(CHUNK)) {
        if chunk.iter().any(|byte| *byte != 0) {
            disk.write_all_at(chunk, at)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn inputs(bundle: &[u8]) -> ImageInputs<'_> {
        ImageInputs {
            kernel: b"\x7fELF kernel",
            bundle,
            uefi_loader: b"MZ loader",
            multiboot2_stub: b"\x7fELF stub",
        }
    }

    /// Needs grub-mkimage and grub-pc-bin, like every image.
    #[test]
    fn a_disk_that_both_firmwares_boot() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("disk.img");
        // Larger than the smallest partition has room for.
        let bundle: Vec<u8> = (0u32..17 << 20).flat_map(u32::to_le_bytes).collect();
        build_image(inputs(&bundle), &out).unwrap();

        let gpt = gpt::GptConfig::new().open(&out).unwrap();
        assert!(gpt.backup_header().is_ok());
        let kinds: Vec<_> = gpt
            .partitions()
            .values()
            .map(|p| (p.part_type_guid.clone(), p.first_lba))
            .collect();
        assert_eq!(
            kinds,
            [(partition_types::BIOS, 2048), (partition_types::EFI, 4096)]
        );

        let image = std::fs::read(&out).unwrap();
        let word = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
        assert_eq!(image[510..512], [0x55, 0xaa]);
        assert_eq!(image[446 + 4], 0xee, "the protective partition");
        assert_eq!(word(0x5c), 2048, "boot.img: where core.img begins");
        assert_eq!(word(MIB as usize + 500), 2049, "core.img: where it goes on");

        let end = ESP as usize
            + gpt.partitions()[&2]
                .bytes_len(LogicalBlockSize::Lb512)
                .unwrap() as usize;
        let volume = Cursor::new(image[ESP as usize..end].to_vec());
        let fs = fatfs::FileSystem::new(volume, fatfs::FsOptions::new()).unwrap();
        assert_eq!(fs.fat_type(), fatfs::FatType::Fat32);
        for (path, want) in [
            ("EFI/BOOT/BOOTX64.EFI", &b"MZ loader"[..]),
            ("tessera/kernel", b"\x7fELF kernel"),
            ("tessera/bundle", &bundle),
            ("tessera/boot32", b"\x7fELF stub"),
            ("boot/grub/grub.cfg", GRUB_CFG.as_bytes()),
        ] {
            let mut content = Vec::new();
            let mut file = fs.root_dir().open_file(path).unwrap();
            file.read_to_end(&mut content).unwrap();
            assert!(content == want, "{path}");
        }

        let again = dir.path().join("again.img");
        build_image(inputs(&bundle), &again).unwrap();
        assert!(std::fs::read(&again).unwrap() == image, "not reproducible");
    }

    #[test]
    fn what_is_no_program_is_refused() {
        let mut inputs = inputs(b"");
        inputs.kernel = b"<html>";
        let error = build_image(inputs, Path::new("/nonexistent")).unwrap_err();
        assert_eq!(error.to_string(), "the kernel (6 bytes) is no ELF file");
        let error = build_image(self::inputs(b""), Path::new("/nonexistent/x")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x"), "{error}");
    }
}
