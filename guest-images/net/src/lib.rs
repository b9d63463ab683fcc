//! A network for guests: a driver for virtio-net, and TCP/IP over it by smoltcp.
//!
//! The words of the command line say what is done with it:
//!
//! | word | what |
//! | --- | --- |
//! | `ip=10.9.0.3/24` | the address, which else comes by DHCP |
//! | `tessera.ip=10.9.0.3/24` | the address if there is no lease within ten seconds |
//! | `gw=10.9.0.1` | the gateway beside such an address |
//! | `ping=10.0.2.2,10.9.0.4` | each is asked four times, for at most half a minute to the first answer |
//! | `send=10.9.0.4:9000,100000` | so many bytes go to a sink, whose sum must be right |
//! | `fetch=10.9.0.4:9001` | what comes from there until its end is counted and summed |
//! | `stay`, `stay=30` | serves on, for ever or for so many seconds |
//! | `intx` | the card interrupts by its pin |
//!
//! All the while it answers ARP and pings, and serves by TCP: 7 echo, 9 discard, 9000 the sink (it
//! answers how many bytes came, and their CRC-32, when the sender has ended), 9001 the source of a
//! mebibyte of the same kind.
#![no_std]

mod card;
mod talk;

pub use card::Card;
pub use talk::talk;
