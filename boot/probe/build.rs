//! Links like the kernel, by this crate's own script.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=linker.ld");
    println!("cargo::rustc-link-arg-bins=-T{here}/linker.ld");
    println!("cargo::rustc-link-arg-bins=-zmax-page-size=4096");
}
