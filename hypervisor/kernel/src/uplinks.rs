//! The machine's network cards, as uplinks: found by PCI, each with memory of its own, looked after
//! by the boot core.

use crate::bring_up::{self, Host, frame_run, give_back_run};
use crate::frames::Frames;
use crate::lock::Lock;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use arch::{FrameSource, HostPhysAddr, Nanos, PAGE_SIZE, PageSize};
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use cpu::paging::Caching;
use hw::acpi::AcpiInfo;
use hw::mmio::{DmaRegion, Window};
use hw::pci::{Address, Bar, Function, Messages, Pci};
use hw::{IoApic, Trigger};
use log::{error, info};
use nic::ids::Kind;
use nic::intel::Family;
use nic::virtio::Windows;
use nic::{Fault, Nic};
use vm::config::network::NicChoice;

/// Where devices' registers are mapped.
const DEVICES: u64 = 0xffff_ff02_0000_0000;
/// The most that is mapped for one window: Intel's registers, and all of a virtio device's.
const MAX_WINDOW: u64 = 128 << 10;
/// Pages of a card's memory.
const PAGES: u64 = (nic::MEMORY as u64).div_ceil(PAGE_SIZE);
/// How often cards are looked after, in nanoseconds.
const POLL: u64 = 100_000_000;
/// How often cards that cannot interrupt are.
const LOOK: u64 = 500_000;

static MAPPED: AtomicU64 = AtomicU64::new(DEVICES);
static UPLINKS: Lock<Vec<Uplink>> = Lock::new(Vec::new());
/// There are some.
static ANY: AtomicBool = AtomicBool::new(false);
/// One of them wants to be looked at.
static FIRED: AtomicBool = AtomicBool::new(false);
/// Where pins of cards end, and which pin is the serial port's.
static IO_APIC: Lock<Option<(IoApic, u8)>> = Lock::new(None);
/// The pins that cards have there, a set.
static PINS: AtomicU32 = AtomicU32::new(0);

/// A network card of the machine.
pub struct Uplink {
    /// Where it is.
    pub address: Address,
    /// The card.
    pub nic: Box<dyn Nic + Send>,
    /// It can interrupt the boot core.
    interrupts: bool,
    /// It is in a switch.
    used: bool,
    /// Frames were queued and not flushed.
    waits: bool,
}

/// A card that is set up, and whether it can interrupt.
type Opened = (Box<dyn Nic + Send>, bool);

/// Why a card is left alone.
enum Trouble {
    Fault(Fault),
    Bar(u8),
    Part(&'static str),
    Memory,
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => fault.fmt(f),
            Self::Bar(bar) => write!(f, "the firmware gave its BAR {bar} no usable place"),
            Self::Part(part) => write!(f, "it has no usable {part} structure of virtio 1.x"),
            Self::Memory => f.write_str("there is no memory for its rings"),
        }
    }
}

/// Finds all cards that there is a driver for, sets them up, and says so.
///
/// # Safety
/// Called once, on the boot core, with interrupts off, before another core runs.
pub unsafe fn find(host: &Host, acpi: &AcpiInfo) {
    let regions = hw::acpi::ecam(host.map, acpi);
    // SAFETY: nobody else reads or writes configuration space.
    let pci = unsafe { Pci::find(host.map, regions) };
    let functions = pci.functions();
    info!(
        "PCI: {} functions, reached by {}",
        functions.len(),
        if pci.has_ecam() { "memory" } else { "ports" }
    );
    for function in &functions {
        let Some(kind) = nic::ids::find(function.vendor, function.device) else {
            continue;
        };
        let name = format_args!(
            "{} {:04x}:{:04x} {}",
            function.address,
            function.vendor,
            function.device,
            kind.name()
        );
        pci.open_bridges(function.address, &functions);
        match open(host, &pci, function, kind) {
            Ok((nic, interrupts)) => {
                info!("nic {name} {}, {}", nic.mac(), nic.link());
                UPLINKS.lock().push(Uplink {
                    address: function.address,
                    nic,
                    interrupts,
                    used: false,
                    waits: false,
                });
                ANY.store(true, Ordering::Release);
            }
            Err(trouble) => error!("nic {name} is not used: {trouble}"),
        }
    }
}

/// Keeps the I/O APIC for the cards; the serial port has this pin.
pub fn use_io_apic(io_apic: IoApic, serial: u8) {
    *IO_APIC.lock() = Some((io_apic, serial));
}

/// Lets a card interrupt by its pin, where that leads to the I/O APIC: `true`. Otherwise it is
/// polled.
fn route_pin(host: &Host, pci: &Pci, at: Address) -> bool {
    if let Some((io_apic, serial)) = IO_APIC.lock().as_mut()
        && let Some(pin) = pci.pin(at)
        && pin != *serial
        && (io_apic.route(pin, Trigger::Level, hw::NIC_VECTOR, host.apic.id())).is_ok()
    {
        pci.use_pin(at);
        PINS.fetch_or(1 << pin, Ordering::Relaxed);
        return true;
    }
    false
}

/// Masks all pins of cards, or lets them through again.
fn mask_pins(masked: bool) {
    let pins = PINS.load(Ordering::Relaxed);
    if pins != 0
        && let Some((io_apic, _)) = IO_APIC.lock().as_mut()
    {
        for pin in (0..16).filter(|pin| pins & 1 << pin != 0) {
            io_apic.set_masked(pin, masked);
        }
    }
}

/// An interrupt of a card, by message or pin. A pin stays masked until the cards have been looked
/// at: it may be another device's, too, which nobody quiets.
pub fn interrupt() {
    mask_pins(true);
    FIRED.store(true, Ordering::Release);
}

/// Takes a function, gives it memory and sets it up; on failure leaves it without access to memory.
fn open(host: &Host, pci: &Pci, function: &Function, kind: Kind) -> Result<Opened, Trouble> {
    let memory = frame_run(PAGES).ok_or(Trouble::Memory)?;
    let result = open_with(host, pci, function.address, kind, memory);
    if result.is_err() {
        pci.release(function.address);
        give_back_run(memory, PAGES);
    }
    result
}

fn open_with(
    host: &Host,
    pci: &Pci,
    at: Address,
    kind: Kind,
    memory: HostPhysAddr,
) -> Result<Opened, Trouble> {
    // SAFETY: fresh frames, which are given back only after the card's access to memory ended.
    let region = unsafe { DmaRegion::new(host.map, memory, nic::MEMORY) };
    let region = region.ok_or(Trouble::Memory)?;
    let bar = |index| pci.bar(at, index).ok_or(Trouble::Bar(index));
    let mut wait = |microseconds| {
        let from = hw::rdtsc();
        while !bring_up::passed(from, microseconds) {
            core::hint::spin_loop();
        }
        // The card has been told to forget what firmware set up.
        pci.make_master(at);
    };
    match kind {
        Kind::Intel(family) => {
            let registers = map(host, bar(0)?, 0, MAX_WINDOW).ok_or(Trouble::Bar(0))?;
            pci.take(at);
            let messages = match pci.messages(at) {
                // MSI of the PCI-X cards is not to be relied on (82545GM and 82546GB errata).
                Some(Messages::Msi(capability)) if family != Family::E1000 => {
                    pci.use_msi(at, capability, host.apic.id(), hw::NIC_VECTOR)
                }
                _ => false,
            };
            let nic = nic::intel::open(registers, region, family, &mut wait)?;
            Ok((Box::new(nic), messages || route_pin(host, pci, at)))
        }
        Kind::Virtio => {
            let parts = pci.virtio_parts(at);
            let part = |kind, name| {
                let mut parts = parts.iter().filter(|part| part.kind == kind);
                let found = parts.find_map(|part| {
                    let bar = pci.bar(at, part.bar)?;
                    let window = map(host, bar, part.offset.into(), part.bytes.into())?;
                    Some((window, part.multiplier))
                });
                found.ok_or(Trouble::Part(name))
            };
            let (notify, notify_multiplier) = part(2, "notification")?;
            let windows = Windows {
                common: part(1, "configuration")?.0,
                notify,
                notify_multiplier,
                isr: part(3, "interrupt")?.0,
                device: part(4, "network")?.0,
            };
            pci.take(at);
            let messages = match pci.messages(at) {
                Some(Messages::MsiX {
                    capability,
                    bar,
                    offset,
                }) => {
                    let bar = pci.bar(at, bar);
                    let table = bar.and_then(|bar| map(host, bar, offset.into(), 16));
                    table.is_some_and(|mut table| {
                        let (id, vector) = (host.apic.id(), hw::NIC_VECTOR);
                        pci.use_msix(at, capability, &mut table, id, vector)
                    })
                }
                _ => false,
            };
            let nic = nic::virtio::open(windows, region, messages, &mut wait)?;
            Ok((Box::new(nic), messages || route_pin(host, pci, at)))
        }
    }
}

/// Maps a part of a device's memory, up to [`MAX_WINDOW`] of it; `None` where it is not the
/// device's or cannot be mapped.
fn map(host: &Host, bar: Bar, offset: u64, bytes: u64) -> Option<Window> {
    let bytes = bytes.min(MAX_WINDOW).min(bar.bytes.checked_sub(offset)?);
    let first = bar.start.checked_add(offset)?;
    let page = first.align_down(PAGE_SIZE);
    let inset = first.offset_in(PAGE_SIZE);
    let pages = (inset + bytes).div_ceil(PAGE_SIZE);
    let at = MAPPED.fetch_add(pages * PAGE_SIZE, Ordering::Relaxed);
    for index in 0..pages {
        let frame = page.wrapping_add(index * PAGE_SIZE);
        let mut allocate = || Frames.allocate(PageSize::Size4K);
        // SAFETY: the tables are in use, and the registers are the device's that is being taken.
        let mapped = unsafe {
            cpu::paging::map_page(
                &host.map,
                cpu::paging::root(),
                at + index * PAGE_SIZE,
                (frame, Caching::Uncached),
                &mut allocate,
            )
        };
        mapped.then_some(())?;
    }
    let usable = bytes > 0 && inset.is_multiple_of(4);
    // SAFETY: just mapped, uncached, for good, in the tables that all cores use; registers of the
    // device that is being taken, which is given memory of its own only.
    usable.then(|| unsafe { Window::new((at + inset) as *mut u8, bytes as u32) })
}

/// Looks after the cards and tells of what happened to them. Gives the time of the next look.
pub fn poll(now: Nanos) -> Option<Nanos> {
    if !ANY.load(Ordering::Acquire) {
        return None;
    }
    let fired = FIRED.swap(false, Ordering::Acquire);
    let look = |index| {
        let mut uplinks = UPLINKS.lock();
        let uplink: &mut Uplink = uplinks.get_mut(index)?;
        if fired {
            uplink.nic.interrupt();
        }
        Some((uplink.address, uplink.nic.poll(now)))
    };
    // Told without the lock: the console may take its time.
    for (address, event) in (0..).map_while(look) {
        if let Some(event) = event {
            info!("nic {address}: {event}");
        }
    }
    if fired {
        mask_pins(false);
    }
    let mut uplinks = UPLINKS.lock();
    let polled = uplinks
        .iter_mut()
        .any(|uplink| uplink.used && !uplink.interrupts);
    Some(now + if polled { LOOK } else { POLL })
}

/// Whether a card interrupted since it was looked at.
pub fn has_fired() -> bool {
    FIRED.load(Ordering::Relaxed)
}

/// Chooses a card that is not `taken` yet, by its number.
pub fn choose(choice: NicChoice, taken: &[usize]) -> Option<usize> {
    let fits = |uplink: &Uplink| match choice {
        NicChoice::First => true,
        NicChoice::Address(bus, device, function) => {
            let segment = 0;
            uplink.address
                == Address {
                    segment,
                    bus,
                    device,
                    function,
                }
        }
        NicChoice::Mac(mac) => uplink.nic.mac().0 == mac.0,
    };
    let mut uplinks = UPLINKS.lock();
    let mut all = uplinks.iter_mut().enumerate();
    let (number, uplink) = all.find(|(number, uplink)| !taken.contains(number) && fits(uplink))?;
    uplink.used = true;
    uplink.nic.set_interrupts(uplink.interrupts);
    Some(number)
}

/// The cards there are, for a person.
pub fn list() -> String {
    let uplinks = UPLINKS.lock();
    if uplinks.is_empty() {
        return "none".into();
    }
    let names: Vec<String> = uplinks
        .iter()
        .map(|uplink| format!("{} ({})", uplink.address, uplink.nic.mac()))
        .collect();
    names.join(", ")
}

/// What a card is and passed, for a person.
pub fn about(number: usize) -> Option<(String, nic::Counters)> {
    let uplinks = UPLINKS.lock();
    let uplink = uplinks.get(number)?;
    let state: &dyn fmt::Display = match uplink.nic.works() {
        true => &uplink.nic.link(),
        false => &"does not work",
    };
    let about = format!("card {} {}, {state}", uplink.address, uplink.nic.mac());
    Some((about, *uplink.nic.counters()))
}

/// Whether a card works and has a link.
pub fn has_link(number: usize) -> bool {
    let uplinks = UPLINKS.lock();
    let uplink = uplinks.get(number);
    uplink.is_some_and(|uplink| uplink.nic.works() && uplink.nic.link().up)
}

/// Queues a frame at a card; [`flush`] sends it. What the card cannot take it counts.
pub fn transmit(number: usize, frame: &[&[u8]]) {
    if let Some(uplink) = UPLINKS.lock().get_mut(number) {
        let _ = uplink.nic.transmit(frame);
        uplink.waits = true;
    }
}

/// Sends what was queued.
pub fn flush() {
    if !ANY.load(Ordering::Acquire) {
        return;
    }
    for uplink in UPLINKS.lock().iter_mut().filter(|uplink| uplink.waits) {
        uplink.nic.flush();
        uplink.waits = false;
    }
}

/// Shows up to `budget` frames that came by a card; gives how many there were.
pub fn receive(number: usize, budget: usize, show: &mut dyn FnMut(&[u8])) -> usize {
    let mut uplinks = UPLINKS.lock();
    let uplink = uplinks.get_mut(number);
    uplink.map_or(0, |uplink| uplink.nic.receive(budget, show))
}

/// Ends the cards' accesses to memory, before the machine is left.
pub fn stop() {
    // A core that holds the lock was stopped and will not give it back.
    if let Some(mut uplinks) = UPLINKS.try_lock() {
        for uplink in uplinks.iter_mut() {
            uplink.nic.stop();
        }
    }
}
