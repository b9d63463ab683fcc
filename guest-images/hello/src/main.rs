//! Says hello, tells what CPU it finds, and ends well. With a network card it then does with that
//! what its command line says (see [`guest_net`]), and ends by value 1 if not all of it went well.
#![no_std]
#![no_main]

use guest_net::Card;
use guest_runtime::virtio::{Virtio, kind};
use guest_runtime::{cmdline, cpu, entry, exit, pc, println};

entry!(main);

fn text(words: &[u32]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for (to, from) in bytes
        .iter_mut()
        .zip(words.iter().flat_map(|word| word.to_le_bytes()))
    {
        *to = from;
    }
    bytes
}

fn main() {
    let [_, b, c, d] = cpu::cpuid(0, 0);
    let vendor = text(&[b, d, c]);
    println!(
        "hello from a guest on {}",
        core::str::from_utf8(&vendor).unwrap_or("?")
    );
    if cpu::cpuid(1, 0)[2] >> 31 != 0 {
        let [_, b, c, d] = cpu::cpuid(0x4000_0000, 0);
        let hypervisor = text(&[b, c, d]);
        println!(
            "hypervisor: {}",
            core::str::from_utf8(&hypervisor).unwrap_or("?")
        );
    }
    if Virtio::first(kind::NET).is_some() {
        pc::quiet();
        let by_pin = cmdline().split_whitespace().any(|word| word == "intx");
        let well = Card::open(by_pin).map(guest_net::talk);
        if well.is_none() {
            println!("hello: the network card does not start");
        }
        if well != Some(true) {
            exit(1)
        }
    }
}
