fn main() {
    let a: Vec<String> = std::env::args().collect();
    match harness::oracle::run(
        std::path::Path::new("/tmp/vsf/run"),
        a[1].parse().unwrap(),
        a[2].parse().unwrap(),
    ) {
        Ok(s) => println!("OK {s}"),
        Err(e) => {
            println!("{e:?}");
            std::process::exit(1)
        }
    }
}
