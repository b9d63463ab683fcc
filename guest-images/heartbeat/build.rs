//! Links the guest where its loader wants it.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest.ld");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rustc-link-arg-bins=-T{script}");
}
