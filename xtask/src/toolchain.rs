//! Which cargo and rustc build for the bare machine.
//!
//! The pinned toolchain with its two bare targets is the rule; a target that is missing is added by
//! `rustup target add`. Where rustup cannot (no network to it, no rustup at all), the distribution's
//! compiler builds `core` and `alloc` from the distribution's own sources with `-Zbuild-std`, in a
//! target directory of its own. `TESSERA_TOOLCHAIN=distro` forces that, which is how the tests prove
//! that it still works.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::process::limited;

use crate::packages::{self, DISTRO_RUST, find_program};
use crate::progress::{note, step};

/// The hypervisor, its multiboot2 stub and the guests.
pub const NONE: &str = "x86_64-unknown-none";
/// The UEFI loader.
pub const UEFI: &str = "x86_64-unknown-uefi";

/// The environment variable that chooses: `distro`, or `rustup` (the same as unset).
pub const VARIABLE: &str = "TESSERA_TOOLCHAIN";

/// What rustup gets to add a target.
const RUSTUP_LIMIT: Duration = Duration::from_secs(180);
/// The profile of everything on the bare machine.
const PROFILE: &str = "bare";

/// Where the sources are and where what is made from them goes.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// The folder of the top `Cargo.toml`.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

impl Workspace {
    /// The workspace that this program was built from.
    pub fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest
            .parent()
            .context("xtask's folder has no parent")?
            .to_owned();
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(
            || root.join("target"),
            |dir| env::current_dir().unwrap_or_default().join(dir),
        );
        Ok(Self { root, target })
    }

    /// A folder of our own below the target directory, created.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.target.join("tessera").join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(dir)
    }
}

/// A compiler for the bare targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// The running toolchain, with prebuilt `core` and `alloc`.
    Prebuilt,
    /// The distribution's, building them from source.
    Distro,
}

impl Toolchain {
    /// Finds or makes one that builds for both bare targets.
    pub fn ready() -> Result<Self> {
        match env::var(VARIABLE).as_deref() {
            Err(_) | Ok("" | "rustup") => {}
            Ok("distro") => return Self::distro("asked for by TESSERA_TOOLCHAIN"),
            Ok(other) => bail!("{VARIABLE}={other}: known are `rustup` and `distro`"),
        }
        let missing: Vec<&str> = [NONE, UEFI]
            .into_iter()
            .filter(|t| !has_target(t))
            .collect();
        if missing.is_empty() {
            return Ok(Self::Prebuilt);
        }
        match add_targets(&missing) {
            Ok(()) => Ok(Self::Prebuilt),
            Err(error) => Self::distro(&format!("no {} by rustup: {error:#}", missing.join(", "))),
        }
    }

    /// The distribution's, installed if it is missing; `why` is told.
    pub fn distro(why: &str) -> Result<Self> {
        note(&format!(
            "building core and alloc from the distribution's Rust sources ({why})"
        ));
        packages::need(&DISTRO_RUST)?;
        let output = Command::new("/usr/bin/rustc").arg("--version").output();
        let output = output.context("running /usr/bin/rustc")?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        let minor = version
            .split('.')
            .nth(1)
            .and_then(|m| m.parse::<u32>().ok())
            .unwrap_or(0);
        if minor < 95 {
            bail!(
                "/usr/bin/rustc is {}, and 1.95 is the least; use rustup",
                version.trim()
            );
        }
        Ok(Self::Distro)
    }

    /// Builds `packages` for a bare target and returns the folder with the programs.
    pub fn build(
        &self,
        workspace: &Workspace,
        target: &str,
        packages: &[&str],
        features: &[&str],
    ) -> Result<PathBuf> {
        let (mut cargo, dir) = match self {
            Self::Prebuilt => (cargo(), workspace.target.clone()),
            Self::Distro => (distro_cargo(), workspace.target.join("distro")),
        };
        cargo
            .current_dir(&workspace.root)
            .arg("build")
            .args(["--profile", PROFILE]);
        cargo
            .args(["--target", target])
            .arg("--target-dir")
            .arg(&dir);
        if *self == Self::Distro {
            cargo.args([
                "-Zbuild-std=core,alloc,compiler_builtins",
                "-Zbuild-std-features=compiler-builtins-mem",
            ]);
        }
        for package in packages {
            cargo.args(["--package", package]);
        }
        for feature in features {
            cargo.args(["--features", feature]);
        }
        let with = match features {
            [] => String::new(),
            features => format!(" ({})", features.join(", ")),
        };
        let what = format!("building {}{with} for {target}", packages.join(", "));
        step(&what, |_| packages::run(cargo))?;
        Ok(dir.join(target).join(PROFILE))
    }
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn rustc() -> Command {
    let beside = env::var_os("CARGO").map(|cargo| Path::new(&cargo).with_file_name("rustc"));
    Command::new(
        beside
            .filter(|p| p.exists())
            .unwrap_or_else(|| "rustc".into()),
    )
}

/// The distribution's cargo, with nothing of rustup's left in its environment.
fn distro_cargo() -> Command {
    let mut cargo = Command::new("/usr/bin/cargo");
    for name in [
        "CARGO",
        "RUSTUP_TOOLCHAIN",
        "RUSTUP_HOME",
        "RUSTC_WRAPPER",
        "RUSTFLAGS",
        "LD_LIBRARY_PATH",
    ] {
        cargo.env_remove(name);
    }
    cargo
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", "ld.lld")
        .env("CARGO_TARGET_X86_64_UNKNOWN_UEFI_LINKER", "lld-link");
    cargo
}

/// Whether the running toolchain has a prebuilt `core` for `target`.
pub fn has_target(target: &str) -> bool {
    let output = rustc()
        .args(["--print", "target-libdir", "--target", target])
        .output();
    let Ok(output) = output else { return false };
    let dir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let Ok(files) = dir.read_dir() else {
        return false;
    };
    files
        .flatten()
        .any(|f| f.file_name().to_string_lossy().starts_with("libcore-"))
}

fn add_targets(targets: &[&str]) -> Result<()> {
    if find_program("rustup").is_none() {
        bail!("rustup is not installed");
    }
    step(&format!("rustup target add {}", targets.join(" ")), |_| {
        let mut rustup = limited("rustup", RUSTUP_LIMIT);
        rustup
            .args(["target", "add"])
            .args(targets)
            .stdin(Stdio::null());
        packages::run(rustup)
    })?;
    match targets.iter().find(|t| !has_target(t)) {
        None => Ok(()),
        Some(target) => bail!("rustup added {target}, but this cargo does not see it"),
    }
}
