//! From the loader's jump to the first guest.

use crate::backend::{self, Backend};
use crate::frames::{self, Frames};
use crate::manager::{Manager, Over};
use crate::run::{Machine, Worker};
use crate::{console, cores, panic, run, uplinks};
use alloc::boxed::Box;
use alloc::vec::Vec;
use arch::{FrameSource, HostPhysAddr, PAGE_SIZE, PageSize, PhysMemory};
use bootloader_api::BootInfo;
use bootloader_api::info::{MemoryRegionKind, PixelFormat};
use core::sync::atomic::{AtomicU64, Ordering};
use cpu::host::{CoreTables, EmergencyStacks, InterruptFrame};
use cpu::page::HostPage;
use cpu::paging::Caching;
use cpu::percpu::{Core, this};
use hw::acpi::AcpiInfo;
use hw::{CoreTimer, DirectMap, Framebuffer, IoApic, LocalApic, Screen, Serial, Trigger};
use log::{error, info, warn};
use spin::Once;
use vm::bundle::Bundle;
use vm::config::{Config, WhenDone};

/// Exit status for a machine or a configuration that cannot run guests.
pub const STATUS_BOOT: u32 = 102;

/// Pages of an emergency stack.
const EMERGENCY_PAGES: u64 = 4;
/// The stacks of a core: its main one, and four for emergencies.
const STACK_PAGES: [u64; 5] = [
    16,
    EMERGENCY_PAGES,
    EMERGENCY_PAGES,
    EMERGENCY_PAGES,
    EMERGENCY_PAGES,
];
/// Where the stacks of cores are mapped, how far apart: each is above a page that is not mapped.
const STACKS: u64 = 0xffff_ff01_0000_0000;
/// See [`STACKS`].
pub const STACKS_STRIDE: u64 = 64 * PAGE_SIZE;

/// What the whole machine has, found once.
pub struct Host {
    /// Physical memory.
    pub map: DirectMap,
    /// The TSC's frequency in Hz.
    pub tsc_hz: u64,
    /// Nanoseconds since 1970 when the TSC read `wall_tsc`.
    pub wall_clock: u64,
    /// See `wall_clock`.
    pub wall_tsc: u64,
    /// The calling core's local APIC, whichever core that is.
    pub apic: LocalApic,
    /// The cores that run, by number.
    pub cores: &'static [&'static Core],
}

impl Host {
    /// Calls a core out of guest mode or its halt, so that it looks at what was left for it. One
    /// call is enough until the core has taken it ([`Core::take_kick`]).
    pub fn kick(&self, core: usize) {
        if let Some(core) = self.cores.get(core) {
            kick(&self.apic, core);
        }
    }
}

fn kick(apic: &LocalApic, core: &Core) {
    if !core.kicked.swap(true, Ordering::AcqRel) {
        apic.send_ipi(core.apic_id(), hw::KICK_VECTOR);
    }
}

/// Calls the boot core, which may be the caller, as an interrupt of the machine does.
pub fn call_boot_core() {
    run::host_interrupt();
    if let Some(apic) = APIC.get() {
        kick(apic, &BOOT_CORE);
    }
}

/// The boot core.
pub static BOOT_CORE: Core = Core::new(0, 0);
static ACPI: Once<AcpiInfo> = Once::new();
static APIC: Once<LocalApic> = Once::new();
/// What happens at the end; set when the configuration is known.
static WHEN_DONE: Once<WhenDone> = Once::new();
/// TSC at the hand-off, for the bench.
static START: AtomicU64 = AtomicU64::new(0);

/// The TSC's frequency in Hz, once it is known; 0 before.
static TSC_HZ: AtomicU64 = AtomicU64::new(0);

/// Brings the machine up, runs the guests, and ends.
pub fn main(boot: &'static mut BootInfo) -> ! {
    // SAFETY: first of all, on the boot core.
    unsafe { BOOT_CORE.adopt() };
    START.store(hw::rdtsc(), Ordering::Relaxed);
    let offset = boot.physical_memory_offset.into_option();
    let ram = boot
        .memory_regions
        .iter()
        .filter(|region| is_ram(region.kind));
    let top = ram.map(|region| region.end).max().unwrap_or(0);
    // SAFETY: the hand-off promises this window (see boot/); without it nothing can be reached.
    let map = unsafe { DirectMap::new(offset.unwrap_or(0), top.max(4 << 30)) };
    // SAFETY: the loader is gone, so the port and the screen are ours.
    let (serial, screen) = unsafe { (Serial::com1(), find_screen(boot, map)) };
    // SAFETY: the loader's memory map is the truth about what is free.
    let memory = unsafe { frames::init(&boot.memory_regions, map) };
    console::init(serial, screen);
    info!("Tessera {} on x86_64", env!("CARGO_PKG_VERSION"));
    if offset.is_none() {
        fail("the loader handed over no direct map of physical memory: use Tessera's own loader");
    }
    match memory {
        Ok(bytes) => info!(
            "memory: {} MiB free in {} regions",
            bytes >> 20,
            boot.memory_regions.len()
        ),
        Err(short) => {
            error!(
                "memory: {} KiB needed, largest free region has {} KiB",
                short.needed >> 10,
                short.largest >> 10
            );
            fail("this machine has too little memory: give it at least 16 MiB")
        }
    }
    check_tables(map);
    if map_stacks(map, 0).is_none() {
        fail("no memory for the emergency stacks");
    }
    install_tables(0);
    let mut host = find_hardware(map, boot.rsdp_addr.into_option());
    // SAFETY: the boot core, once, interrupts off, and no other core runs yet.
    unsafe { uplinks::find(&host, &ACPI.get().copied().unwrap_or_default()) };
    let bundle = ramdisk(boot, map);
    match backend::enable(&host) {
        Ok(backend) => {
            let backend: &'static dyn Backend = Box::leak(backend);
            // SAFETY: this core's timer is ours.
            let timer = unsafe { CoreTimer::new(host.apic, host.tsc_hz) };
            info!("timer: {}", timer.mode());
            let (bundle, config) = configuration(bundle);
            let low = frames::low_pages(&boot.memory_regions, cpu::start::PAGES);
            let acpi = ACPI.get().copied().unwrap_or_default();
            let most = config.host.cores.unwrap_or(u32::MAX);
            cores::start(&mut host, &acpi, backend, &timer, low, most);
            start(Box::leak(Box::new(host)), backend, timer, bundle, &config)
        }
        Err(error) => {
            error!("{error}");
            fail("no guest can run on this machine")
        }
    }
}

/// Whether so many microseconds have passed since the TSC read `from`.
pub fn passed(from: u64, microseconds: u64) -> bool {
    let hz = TSC_HZ.load(Ordering::Relaxed);
    hw::rdtsc().wrapping_sub(from) >= hz / 1_000_000 * microseconds
}

/// Ends with a clear message: the machine cannot do its job.
fn fail(reason: &str) -> ! {
    end(STATUS_BOOT, reason)
}

/// Stops the other cores, prints the last line and leaves the machine as the configuration says.
pub fn end(status: u32, reason: &str) -> ! {
    leave(
        status,
        reason,
        WHEN_DONE.get().copied().unwrap_or(WhenDone::PowerOff),
    )
}

/// Stops the other cores, prints the last line and leaves the machine.
fn leave(status: u32, reason: &str, when_done: WhenDone) -> ! {
    cores::stop_others();
    uplinks::stop();
    // What guests have said goes before the last line.
    console::drain();
    console::say(format_args!("end: status={status} {reason}"));
    console::drain();
    // An emulator may hold the last characters back for some milliseconds more.
    let now = hw::rdtsc();
    while !passed(now, 20_000) {
        core::hint::spin_loop();
    }
    if let Some(acpi) = ACPI.get() {
        // SAFETY: the tables are the machine's own and all work is over.
        unsafe {
            match when_done {
                WhenDone::PowerOff => hw::power::off(acpi),
                WhenDone::Reboot => hw::power::reset(acpi),
                WhenDone::Halt => {}
            }
        }
    }
    cpu::host::stop()
}

/// What the direct map reaches: memory of any use. Some firmware lists reserved ranges at the far
/// end of the address space, which the loader does not map (the hand-off in boot/).
const fn is_ram(kind: MemoryRegionKind) -> bool {
    use MemoryRegionKind::{Bootloader, UnknownBios, UnknownUefi, Usable};
    matches!(
        kind,
        Usable | Bootloader | UnknownBios(3 | 4) | UnknownUefi(1..=7 | 9 | 10)
    )
}

/// The framebuffer that the loader handed over, else VGA text.
///
/// # Safety
/// Nothing else writes the screen.
unsafe fn find_screen(boot: &BootInfo, map: DirectMap) -> Option<Screen> {
    let Some(frame) = boot.framebuffer.as_ref() else {
        // SAFETY: promised by the caller; without a framebuffer the loader left text mode.
        return Some(unsafe { Screen::text(map) });
    };
    let info = frame.info();
    let frame = Framebuffer {
        start: map.physical(frame.buffer().as_ptr()),
        bytes: info.byte_len as u64,
        width: info.width,
        height: info.height,
        stride: info.stride,
        bytes_per_pixel: info.bytes_per_pixel,
        red_first: info.pixel_format == PixelFormat::Rgb,
    };
    // The loader maps the framebuffer wherever it lies.
    let end = frame.start.checked_add(frame.bytes)?.as_u64();
    let offset = boot.physical_memory_offset.into_option()?;
    // SAFETY: the hand-off promises this; only the framebuffer is reached through it.
    let map = unsafe { DirectMap::new(offset, map.limit().max(end)) };
    // SAFETY: promised by the caller.
    unsafe { Screen::pixels(map, frame) }
}

/// The loader's page tables: scaffold removed, rights checked.
fn check_tables(map: DirectMap) {
    let root = cpu::paging::root();
    // SAFETY: code, stack and boot information are all in the upper half.
    unsafe { cpu::paging::clear_lower_half(&map, root) };
    let audit = cpu::paging::audit(&map, root);
    if audit.writable_executable > 0 || audit.lower_half > 0 {
        error!("page tables: {audit:?}");
        fail("the loader left pages both writable and executable: use Tessera's own loader");
    }
    info!(
        "page tables: {} entries, none writable and executable, lower half empty",
        audit.leaves
    );
}

/// Tops of a core's stacks, the main one first. The boot core (0) has its main one from the loader.
pub fn stacks(core: u64) -> [u64; 5] {
    let mut at = STACKS + core * STACKS_STRIDE;
    STACK_PAGES.map(|pages| {
        at += (1 + pages) * PAGE_SIZE;
        at
    })
}

const _: () = assert!(5 + 16 + 4 * EMERGENCY_PAGES <= STACKS_STRIDE / PAGE_SIZE);

/// Maps a core's stacks, each above a page that stays unmapped.
pub fn map_stacks(map: DirectMap, core: u64) -> Option<()> {
    let wanted = usize::from(core == 0);
    for (top, pages) in stacks(core).into_iter().zip(STACK_PAGES).skip(wanted) {
        for page in 1..=pages {
            let mut allocate = || Frames.allocate(PageSize::Size4K);
            let (root, frame) = (cpu::paging::root(), allocate()?);
            let at = top - page * PAGE_SIZE;
            // SAFETY: the tables are in use and the frame is fresh.
            let mapped = unsafe {
                let page = (frame, Caching::WriteBack);
                cpu::paging::map_page(&map, root, at, page, &mut allocate)
            };
            mapped.then_some(())?;
        }
    }
    Some(())
}

/// The descriptor tables of the calling core, which has these mapped stacks.
pub fn install_tables(core: u64) {
    let [_, double_fault, nmi, machine_check, page_fault] = stacks(core);
    let stacks = EmergencyStacks {
        double_fault,
        nmi,
        machine_check,
        page_fault,
    };
    // SAFETY: first and only time on this core; the stacks are mapped and its own.
    unsafe { CoreTables::install(stacks, on_interrupt) };
}

/// Every interrupt and exception of the host.
fn on_interrupt(frame: &mut InterruptFrame) {
    match frame.vector as u8 {
        // It may have hit while the console was locked, so it is told later.
        2 => {
            if !cores::nmi(frame) {
                run::host_nmi();
            }
        }
        vector @ 0..=31 => {
            debug_assert!(vector < 32);
            panic::exception(frame)
        }
        hw::SPURIOUS_VECTOR => {}
        vector => {
            this().beat();
            match vector {
                hw::KICK_VECTOR => this().kicked.store(true, Ordering::Release),
                hw::TIMER_VECTOR => this().timer_fired.store(true, Ordering::Relaxed),
                hw::NIC_VECTOR => uplinks::interrupt(),
                _ => {}
            }
            if vector != hw::KICK_VECTOR {
                run::host_interrupt();
            }
            if let Some(apic) = APIC.get() {
                apic.end_of_interrupt();
            }
        }
    }
}

fn find_hardware(map: DirectMap, rsdp: Option<u64>) -> Host {
    let acpi = match rsdp {
        Some(rsdp) => hw::acpi::read(map, rsdp),
        None => AcpiInfo::default(),
    };
    ACPI.call_once(|| acpi);
    match rsdp {
        None => warn!("ACPI: the firmware gave no tables; power-off will not work"),
        Some(_) if acpi.damaged > 0 => warn!("ACPI: {} damaged tables are left out", acpi.damaged),
        Some(_) => {}
    }
    // SAFETY: the loader is gone; the timers and the RTC are ours.
    let (tsc, wall) = unsafe { (hw::calibrate(acpi.pm_timer), hw::wall_clock()) };
    let wall_tsc = hw::rdtsc();
    let Ok(tsc) = tsc else {
        fail("neither the ACPI PM timer nor the 8254 counts: no clock")
    };
    if tsc.hz < 1_000_000 {
        fail("the time-stamp counter ticks slower than 1 MHz: no clock")
    }
    TSC_HZ.store(tsc.hz, Ordering::Relaxed);
    info!(
        "TSC: {}.{:03} MHz by the {}",
        tsc.hz / 1_000_000,
        tsc.hz / 1000 % 1000,
        tsc.reference
    );
    if wall.is_none() {
        warn!("RTC: no sensible time; guests start in 1970");
    }
    // SAFETY: this core, interrupts off, and nobody else drives the APIC.
    let Ok(mut apic) = (unsafe { LocalApic::enable(map) }) else {
        fail("the local APIC is not reachable")
    };
    let processors = hw::acpi::processors(map, &acpi, apic.id());
    // SAFETY: the boot core, and no other runs yet.
    unsafe { apic.widen(&processors.ids) };
    APIC.call_once(|| apic);
    let gsi = acpi.com1_gsi.unwrap_or(4);
    let routed = acpi.io_apic.map(|registers| {
        // SAFETY: the I/O APIC is the one the MADT names, and ours.
        let mut io_apic = unsafe { IoApic::new(map, registers)? };
        let routed = io_apic.route(gsi, Trigger::Edge, hw::SERIAL_VECTOR, apic.id());
        uplinks::use_io_apic(io_apic, gsi);
        routed
    });
    if matches!(routed, Some(Ok(()))) {
        console::use_interrupt();
    } else {
        info!("serial port: no interrupt, so it is polled");
        run::poll_serial();
    }
    Host {
        map,
        tsc_hz: tsc.hz,
        // The RTC tells whole seconds: it was read in the middle of one, on average.
        wall_clock: wall.map_or(0, |seconds| seconds * 1_000_000_000 + 500_000_000),
        wall_tsc,
        apic,
        cores: &[],
    }
}

/// The bundle that the loader put into memory.
fn ramdisk(boot: &BootInfo, map: DirectMap) -> &'static [u8] {
    let Some(addr) = boot.ramdisk_addr.into_option() else {
        return &[];
    };
    let physical = map.physical(addr as *const u8);
    let Some(pointer) = map.pointer(physical, boot.ramdisk_len) else {
        return &[];
    };
    // SAFETY: the loader's bundle, kept out of the free frames by its memory map, is never
    // written again.
    unsafe { core::slice::from_raw_parts(pointer, boot.ramdisk_len as usize) }
}

/// One zeroed page of the machine for a control structure.
pub fn host_page(map: DirectMap) -> Option<HostPage> {
    host_pages(map, 1)?.pop()
}

/// `count` pages that follow one another, up to 2 MiB of them.
pub fn frame_run(count: u64) -> Option<HostPhysAddr> {
    // Runs are rare (SVM's permission maps, network cards' rings): they are cut from a large frame.
    let (size, first) = if count == 1 {
        (PageSize::Size4K, Frames.allocate(PageSize::Size4K)?)
    } else {
        (PageSize::Size2M, Frames.allocate(PageSize::Size2M)?)
    };
    let rest = first.wrapping_add(count * PAGE_SIZE);
    give_back_run(rest, size.bytes() / PAGE_SIZE - count);
    Some(first)
}

/// Gives such pages back.
pub fn give_back_run(first: HostPhysAddr, count: u64) {
    for index in 0..count {
        Frames.free(first.wrapping_add(index * PAGE_SIZE), PageSize::Size4K);
    }
}

/// `count` zeroed pages that follow one another.
pub fn host_pages(map: DirectMap, count: u64) -> Option<Vec<HostPage>> {
    let first = frame_run(count)?;
    (0..count)
        .map(|index| {
            let phys: HostPhysAddr = first.wrapping_add(index * PAGE_SIZE);
            map.zero(phys, PAGE_SIZE);
            let pointer = core::ptr::NonNull::new(map.pointer(phys, PAGE_SIZE)?)?;
            // SAFETY: a fresh frame, zeroed, reachable, and nobody else's.
            Some(unsafe { HostPage::new(phys, pointer) })
        })
        .collect()
}

/// The bundle and the configuration in it.
fn configuration(bundle: &'static [u8]) -> (&'static Bundle<'static>, Config) {
    let bundle = match Bundle::open(bundle) {
        Ok(bundle) => bundle,
        Err(error) => {
            error!("bundle: {error}");
            fail("the bundle is damaged: build the image again")
        }
    };
    let config = match read_config(&bundle) {
        Ok(config) => config,
        Err(error) => {
            error!("{error}");
            fail("the configuration cannot be used")
        }
    };
    log::set_max_level(config.host.log);
    WHEN_DONE.call_once(|| config.host.when_done);
    (Box::leak(Box::new(bundle)), config)
}

fn start(
    host: &'static Host,
    backend: &'static dyn Backend,
    timer: CoreTimer,
    bundle: &'static Bundle<'static>,
    config: &Config,
) -> ! {
    machine::emulate::prepare();
    let _ = machine::acpi::prepare();
    let base = frames::heap_used();
    console::say(format_args!("bench hypervisor-heap {base} bytes"));
    let machine = Box::leak(Box::new(Machine::new(host, backend, config)));
    let mut manager = Manager::new(machine, bundle, config);
    console::say(format_args!(
        "bench boot-to-guest {} tsc",
        hw::rdtsc() - START.load(Ordering::Relaxed)
    ));
    cores::release(machine);
    match Worker::new(machine, timer).manage(&mut manager) {
        Over::Done => {
            let (status, reason) = manager.verdict();
            end(status, &reason)
        }
        Over::Left(None) => end(0, "left at the console"),
        Over::Left(Some(when_done)) => leave(0, "left at the console", when_done),
    }
}

fn read_config(bundle: &Bundle<'_>) -> Result<Config, alloc::string::String> {
    use alloc::string::ToString;
    use vm::bundle::CONFIGURATION;
    let text = bundle.get_text(CONFIGURATION);
    let text = text.map_err(|error| error.to_string())?;
    vm::config::parse(text, CONFIGURATION).map_err(|error| error.to_string())
}
