//! One VM: its configuration made into an address space, a virtual PC and vCPUs.

use crate::bundle::{Bundle, BundleError};
use crate::config::{Class, Devices, ImageName, VmConfig};
use crate::dump::{Dump, Interrupts};
use crate::exits::{Counts, Exits};
use crate::layout::MemoryLayout;
use crate::load::{self, Boot, Copies, EntryState, Image, LoadError};
use crate::nic::{self, VmNic};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::{FrameSource, GuestPhysAddr, HostPhysAddr, MemoryFault, Nanos, PhysMemory, Vcpu};
use core::fmt;
use core::sync::atomic::{
    AtomicU8, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, SeqCst},
};
use machine::acpi::{self, AcpiConfig};
use machine::apic::{ApicFabric, LocalApic};
use machine::board::{Board, BoardConfig};
use machine::clock::TscClock;
use machine::cpuid::{CpuidConfig, CpuidPolicy, Enabled};
use machine::emulate::CodePage;
use machine::map;
use machine::msr::MsrState;
use machine::pci::{DeviceFunction, PciFunction};
use memory::{AddressSpace, Format, MapError, Region, RegionError, RegionKind};
use spin::{Mutex, MutexGuard};
use virtio::net::Ask;
use virtio::{console::Console, pci::VirtioPci, rng::Rng};

/// What a running vCPU needs of the core it runs on.
pub trait Host {
    /// The core's TSC.
    fn tsc(&self) -> u64;
    /// Has these vCPUs of the VM look at what came for them: wakes them, or has them leave guest
    /// mode. `true`: the core is wanted for one of them.
    fn kick(&mut self, vcpus: u64) -> bool;
    /// When the core is wanted for something else, in its TSC; `u64::MAX` for never.
    fn turn_end(&self) -> u64;
    /// Takes the core back when its TSC reaches this value (`u64::MAX`: no need to).
    fn arm(&mut self, deadline: u64);
    /// Serves the machine's interrupts that wait. `true`: the core is wanted for something else.
    fn interrupted(&mut self) -> bool;
    /// Shows what the guest wrote on its console.
    fn output(&mut self, bytes: &[u8]);
    /// Moves the frames of the VM's network cards: of queues whose doorbell was rung, and of those
    /// left silent. `true`: some are left silent now, as `ask` says. No lock of the VM is held.
    fn frames(&mut self, ask: Ask) -> bool;
    /// Works while a lock is held that all cores share.
    #[cfg(feature = "fault-injection")]
    fn with_shared_lock(&mut self, work: fn() -> !) -> !;
}

/// Why a vCPU gave the core back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The core is wanted for something else.
    Preempted,
    /// The guest gave up its turn (PAUSE).
    Yield,
    /// Its vCPU sleeps until an interrupt, or until this time at the latest.
    Halted {
        /// In the core's TSC; `u64::MAX` for never.
        until: u64,
    },
    /// [`Vm::order`] says so.
    Ordered,
    /// The VM is over.
    Ended(End),
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// ACPI S5.
    PoweredOff,
    /// The guest reset its machine.
    Reset,
    /// HLT with interrupts off: nothing can wake it.
    Halted,
    /// The debug-exit port: (value << 1) | 1.
    DebugExit(u32),
    /// A person ended it.
    Stopped,
    /// It did something that cannot go on.
    Crashed(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("powered off"),
            Self::Reset => f.write_str("reset"),
            Self::Halted => f.write_str("halted with interrupts off"),
            Self::DebugExit(code) => write!(f, "debug exit, code {code}"),
            Self::Stopped => f.write_str("stopped"),
            Self::Crashed(cause) => write!(f, "crashed: {cause}"),
        }
    }
}

/// A VM could not be made. Whatever had been made of it is gone again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmError {
    /// The configuration asks for more than is free.
    #[error(
        "memory = {} MiB and {} KiB for its page tables and devices are more than the {} MiB \
         that are left: lower `memory` here or in another VM",
        .memory >> 20, .overhead >> 10, .free >> 20
    )]
    TooMuchMemory {
        /// Bytes asked for.
        memory: u64,
        /// Bytes that the VM itself needs.
        overhead: u64,
        /// Bytes free.
        free: u64,
    },
    /// An image is missing or damaged.
    #[error("{0}")]
    Bundle(#[from] BundleError),
    /// An image cannot be loaded.
    #[error("{0}")]
    Load(#[from] LoadError),
    /// The address space cannot be laid out.
    #[error("address space: {0}")]
    Region(#[from] RegionError),
    /// A page cannot be mapped.
    #[error("address space: {0}")]
    Map(#[from] MapError),
    /// The host ran out of memory while the VM was made.
    #[error("writing its memory: {0:?}")]
    Memory(MemoryFault),
    /// A network card's numbers are out of their ranges.
    #[error("its network cards do not fit on the bus")]
    Nic,
    /// The backend cannot make the vCPU.
    #[error("vCPU: {0}")]
    Vcpu(String),
}

/// What a VM is made from.
pub struct VmSetup<'a, 'i, P, F> {
    /// Its section of the configuration.
    pub config: &'a VmConfig,
    /// Where its images are.
    pub bundle: &'a Bundle<'i>,
    /// The backend's table format.
    pub format: Format,
    /// Host memory.
    pub phys: P,
    /// Where its frames come from.
    pub frames: F,
    /// Bytes of host memory that no VM was promised.
    pub free_bytes: u64,
    /// The core's TSC now: the VM's time zero.
    pub tsc: u64,
    /// Its frequency in Hz.
    pub tsc_hz: u64,
    /// The wall clock now, in nanoseconds since 1970 UTC.
    pub wall_clock: u64,
    /// What the backend lets guests use.
    pub enabled: Enabled,
    /// The machine's CPUID.
    pub host_cpuid: &'a dyn Fn(u32, u32) -> [u32; 4],
    /// Random, for the VM's source of random bytes.
    pub random_seed: [u8; 32],
    /// A page to map at the local APIC's address (VMX), if the hardware wants one.
    pub apic_access_page: Option<HostPhysAddr>,
    /// Called from time to time by a core that waits for what another one holds of the VM.
    pub still_waiting: fn(),
}

/// How soon a silent queue of a network card is looked at again while its VM runs, in nanoseconds: a
/// frame waits there no longer.
pub const SILENCE: u64 = 100_000;

/// How often a lock is tried before the wait is a long one: far beyond what a holder may take.
const LONG_WAIT: u32 = 1 << 20;

/// What a backend makes a vCPU from.
#[derive(Clone, Copy, Debug)]
pub struct VcpuParts {
    /// Its number in the VM, which is its APIC id.
    pub id: u32,
    /// The root of the nested tables.
    pub root: HostPhysAddr,
    /// Its local APIC's register page.
    pub apic_page: *const u8,
    /// The bits of CR4 that CPUID allows.
    pub cr4: u64,
}

/// Makes one vCPU.
pub type MakeVcpu<'a, V> = &'a mut dyn FnMut(VcpuParts) -> Result<V, String>;

fn image<'i>(bundle: &Bundle<'i>, image: &ImageName) -> Result<Image<'i>, BundleError> {
    bundle.image(&image.name)
}

/// How much of a file is checked at once.
const CHECKED: usize = 4 << 10;

/// How many frames are given back at once.
const GIVEN_BACK: u64 = 128;

/// Checks the next piece of a VM's images; `true` once all of them are known to be intact.
///
/// # Errors
/// One is missing or damaged.
pub fn check_images(config: &VmConfig, bundle: &Bundle<'_>) -> Result<bool, BundleError> {
    for image in config.images() {
        if !bundle.check(&image.name, CHECKED)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A VM that is being made: it has its address space and its board, and gets its images' contents
/// piece by piece, as there may be many megabytes of them. Dropped, it gives back all that it holds.
pub struct Making<'i, P: PhysMemory, F: FrameSource> {
    vm: Vm<P, F>,
    entry: EntryState,
    copies: Copies<'i>,
}

impl<'i, P: PhysMemory, F: FrameSource> Making<'i, P, F> {
    /// Lays a VM out. Its images are checked here as far as [`check_images`] was not asked to.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn new(setup: VmSetup<'_, 'i, P, F>) -> Result<Self, VmError> {
        Vm::lay_out(setup)
    }

    /// Copies the next piece of an image; `true` when all is there.
    ///
    /// # Errors
    /// The host has no memory left.
    pub fn step(&mut self) -> Result<bool, VmError> {
        Ok(self.copies.step(self.vm.memory.get_mut())?)
    }

    /// The VM, to which vCPUs may be made; and what the first of them starts with.
    #[must_use]
    pub fn finish(self) -> (Arc<Vm<P, F>>, EntryState) {
        (Arc::new(self.vm), self.entry)
    }
}

/// The columns and rows of a console that nobody knows the size of.
const CONSOLE_SIZE: (u16, u16) = (80, 25);

/// Plugs in what the configuration asks for.
fn plug_devices(board: &mut Board, devices: &Devices, seed: [u8; 32]) {
    let mut plug = |device, function: Option<Box<dyn PciFunction>>| {
        if let (Some(place), Some(function)) = (DeviceFunction::new(device, 0), function) {
            // Each has its own place.
            let _ = board.pci.plug(place, function);
        }
    };
    if devices.virtio_console {
        let console = VirtioPci::new(Console::new(CONSOLE_SIZE.0, CONSOLE_SIZE.1));
        plug(map::CONSOLE_DEVICE, console.map(|f| Box::new(f) as _));
    }
    if devices.rng {
        let rng = VirtioPci::new(Rng::new(seed));
        plug(map::RNG_DEVICE, rng.map(|f| Box::new(f) as _));
    }
}

/// What a VM costs the host besides its RAM and the tables that map it, with room to spare:
/// devices, first vCPU, upper page tables.
const OVERHEAD: u64 = 256 << 10;
/// What each further vCPU costs.
const VCPU_OVERHEAD: u64 = 32 << 10;

const fn overhead(vcpus: u32) -> u64 {
    OVERHEAD + (vcpus as u64).saturating_sub(1) * VCPU_OVERHEAD
}

/// What the lower tables of this much RAM take when all of it is backed by base pages.
const fn tables_for(memory: u64) -> u64 {
    memory / 512 + memory / (512 * 512)
}

/// What a VM's vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Order {
    /// Run.
    Run,
    /// Leave the cores, and stay as they are.
    Pause,
    /// Leave the cores: the VM is over.
    Stop,
    /// As [`Order::Stop`], after work for one of them was abandoned: the VM's structures may be
    /// half done, and its locks held for ever.
    Abandon,
}

/// The VM is over, or given up while this vCPU waited for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over;

/// A virtual machine: what its vCPUs share. The board's lock comes before that of the memory, and
/// neither is held across an entry.
pub struct Vm<P: PhysMemory, F: FrameSource> {
    pub(crate) cpuid: CpuidPolicy,
    /// Converts between TSC ticks and the VM's time; its base stays 0.
    pub(crate) clock: TscClock,
    /// The machine's TSC at the VM's time zero.
    pub(crate) origin: u64,
    /// The ways between the vCPUs' local APICs.
    pub(crate) fabric: Arc<ApicFabric>,
    /// When the board next has something to do by itself, in nanoseconds.
    pub(crate) board_next: AtomicU64,
    order: AtomicU8,
    /// vCPUs that nothing but an NMI, INIT or start-up can wake.
    pub(crate) deaf: AtomicU64,
    /// vCPUs whose local APIC is not at its usual place in xAPIC mode.
    pub(crate) elsewhere: AtomicU64,
    board: Mutex<Board>,
    memory: Mutex<AddressSpace<P, F>>,
    /// Accesses to MSRs that do not exist, for the log's rate limit.
    pub(crate) unknown_msrs: AtomicU32,
    /// The wall clock at the VM's time zero, in nanoseconds since 1970 UTC.
    pub(crate) epoch: u64,
    pub(crate) apic_access_page: Option<HostPhysAddr>,
    still_waiting: fn(),
    pub(crate) name: String,
    pub(crate) nics: Vec<VmNic>,
    /// [`SILENCE`] in ticks of the TSC.
    pub(crate) silence: u64,
}

impl<P: PhysMemory, F: FrameSource> Vm<P, F> {
    fn lay_out<'i>(setup: VmSetup<'_, 'i, P, F>) -> Result<Making<'i, P, F>, VmError> {
        let VmSetup { config, bundle, .. } = setup;
        let overhead = overhead(config.vcpus) + tables_for(config.memory);
        if config.memory.saturating_add(overhead) > setup.free_bytes {
            return Err(VmError::TooMuchMemory {
                memory: config.memory,
                overhead,
                free: setup.free_bytes,
            });
        }
        let layout = MemoryLayout::new(config.memory);
        let regions: Vec<Region> = layout
            .ram()
            .iter()
            .map(|range| Region {
                start: GuestPhysAddr::new(range.start),
                bytes: range.end - range.start,
                kind: RegionKind::Ram,
            })
            .collect();
        let mut memory = AddressSpace::new(
            setup.format,
            &regions,
            config.large_pages,
            setup.phys,
            setup.frames,
        )?;
        if let Some(page) = setup.apic_access_page {
            memory.map_device_page(GuestPhysAddr::new(map::LOCAL_APIC), page)?;
        }
        let kernel = image(bundle, &config.kernel)?;
        let initrd = config
            .initrd
            .as_ref()
            .map(|initrd| image(bundle, initrd))
            .transpose()?;
        let modules = config
            .modules
            .iter()
            .map(|module| image(bundle, module))
            .collect::<Result<Vec<_>, _>>()?;
        let khz = u32::try_from(setup.tsc_hz / 1000).unwrap_or(u32::MAX);
        let clock = TscClock::new(khz);
        let cpuid = CpuidPolicy::build(
            setup.host_cpuid,
            &CpuidConfig {
                vcpus: config.vcpus,
                dedicated: config.scheduling.class == Class::Dedicated,
                tsc_khz: khz,
                enabled: setup.enabled,
            },
        );
        let high_ram = config.memory.saturating_sub(map::LOW_RAM_END);
        let mut board = Board::new(&BoardConfig {
            vcpus: config.vcpus,
            low_ram: config.memory - high_ram,
            high_ram,
            hpet: true,
            wall_clock: setup.wall_clock,
            debug_exit: config.devices.debug_exit,
            debug_console: config.devices.debug_console,
            watchdog: config.devices.watchdog,
        });
        plug_devices(&mut board, &config.devices, setup.random_seed);
        let nics = nic::plug(&mut board, &config.nics).ok_or(VmError::Nic)?;
        let rsdp = acpi::install(
            &AcpiConfig {
                vcpus: config.vcpus,
                hpet: true,
                watchdog: config.devices.watchdog,
            },
            &mut memory,
        )
        .map_err(VmError::Memory)?;
        let boot = Boot {
            kind: config.kind,
            kernel,
            initrd,
            modules: &modules,
            cmdline: &config.cmdline,
        };
        let (entry, copies) = load::load(&boot, &layout, &mut memory, rsdp)?;
        let vm = Self {
            cpuid,
            clock,
            origin: setup.tsc,
            fabric: board.apic.fabric().clone(),
            board_next: AtomicU64::new(board.next_event().0),
            order: AtomicU8::new(Order::Run as u8),
            deaf: AtomicU64::new(0),
            elsewhere: AtomicU64::new(0),
            board: Mutex::new(board),
            memory: Mutex::new(memory),
            unknown_msrs: AtomicU32::new(0),
            epoch: setup.wall_clock,
            apic_access_page: setup.apic_access_page,
            still_waiting: setup.still_waiting,
            name: config.name.clone(),
            nics,
            silence: clock.nanos_to_ticks(SILENCE),
        };
        Ok(Making { vm, entry, copies })
    }

    /// Takes a lock, unless the VM is given up.
    #[inline(always)]
    pub(crate) fn lock<'a, T>(&self, what: &'a Mutex<T>) -> Result<MutexGuard<'a, T>, Over> {
        match what.try_lock() {
            Some(guard) => Ok(guard),
            None => self.wait(what),
        }
    }

    #[cold]
    fn wait<'a, T>(&self, what: &'a Mutex<T>) -> Result<MutexGuard<'a, T>, Over> {
        let mut turns = 0u32;
        loop {
            if let Some(guard) = what.try_lock() {
                return Ok(guard);
            }
            // Whoever held it may be gone with it.
            if self.order.load(Acquire) == Order::Abandon as u8 {
                return Err(Over);
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(LONG_WAIT) {
                (self.still_waiting)();
            }
            core::hint::spin_loop();
        }
    }

    #[inline(always)]
    pub(crate) fn board(&self) -> Result<MutexGuard<'_, Board>, Over> {
        self.lock(&self.board)
    }

    #[inline(always)]
    pub(crate) fn memory(&self) -> Result<MutexGuard<'_, AddressSpace<P, F>>, Over> {
        self.lock(&self.memory)
    }

    /// Works on the board from outside of its vCPUs.
    pub(crate) fn with_board<T>(&self, work: impl FnOnce(&mut Board) -> T) -> Option<T> {
        let mut board = self.board().ok()?;
        let result = work(&mut board);
        self.board_done(&board);
        if board.has_actions() {
            // The boot CPU's next look at the board carries them out.
            self.fabric.signal(0);
        }
        Some(result)
    }

    /// Tells when the board is next due, after each access to it; vCPU 0 keeps its time. `true`:
    /// that has changed.
    #[inline(always)]
    pub(crate) fn board_done(&self, board: &Board) -> bool {
        let next = board.next_event().0;
        let moved = next != self.board_next.load(Relaxed);
        if moved {
            self.board_due(next);
        }
        moved
    }

    #[inline(never)]
    fn board_due(&self, next: u64) {
        if next < self.board_next.swap(next, SeqCst) {
            self.fabric.signal(0);
        }
    }

    /// Its name in the configuration.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many vCPUs it has.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.fabric.vcpus()
    }

    /// vCPUs, by bit number, that got something since the last call: those that sleep are to be
    /// woken, those that run are to leave guest mode. To be asked after each call that acts on
    /// the VM.
    #[must_use]
    pub fn take_kicks(&self) -> u64 {
        self.fabric.take_kicks()
    }

    /// Whether something waits for a vCPU that it has not looked at.
    #[must_use]
    pub fn is_signalled(&self, vcpu: usize) -> bool {
        self.fabric.is_signalled(vcpu)
    }

    /// What its vCPUs are to do.
    #[must_use]
    pub fn order(&self) -> Order {
        match self.order.load(Acquire) {
            0 => Order::Run,
            1 => Order::Pause,
            2 => Order::Stop,
            _ => Order::Abandon,
        }
    }

    /// Tells its vCPUs what to do. The first end is final.
    pub fn set_order(&self, order: Order) {
        let _ = self.order.fetch_update(SeqCst, Relaxed, |old| {
            (old < Order::Stop as u8 || order as u8 > old).then_some(order as u8)
        });
        for vcpu in 0..self.vcpus() {
            self.fabric.signal(vcpu);
        }
    }

    /// Bytes of RAM that have a frame.
    #[must_use]
    pub fn backed_bytes(&self) -> u64 {
        self.memory().map_or(0, |memory| memory.backed_bytes())
    }

    /// Gives a part of its memory back, after its end: that of a large one takes its time. `true`
    /// when nothing is left.
    pub fn give_back(&self) -> bool {
        self.memory()
            .map_or(true, |mut memory| memory.give_back(GIVEN_BACK))
    }

    /// Bytes of RAM that the guest was promised.
    #[must_use]
    pub fn promised_bytes(&self) -> u64 {
        self.memory().map_or(0, |memory| memory.promised_bytes())
    }

    /// Bytes of host memory that the VM may still come to take, page tables included.
    #[must_use]
    pub fn outstanding_bytes(&self) -> u64 {
        let Ok(memory) = self.memory() else {
            return 0;
        };
        let promised = memory.promised_bytes();
        let taken = memory.backed_bytes() + memory.table_bytes();
        (promised + tables_for(promised) + overhead(self.vcpus() as u32)).saturating_sub(taken)
    }

    /// Carries on what its devices have to tell, after one of them was given something from outside
    /// of its vCPUs.
    pub fn carry_devices(&self) {
        let _ = self.with_board(Board::carry_pci);
    }

    /// Types on the guest's console when the machine's TSC reads `tsc`; gives how many bytes it
    /// took.
    pub fn input(&self, bytes: &[u8], tsc: u64) -> usize {
        let now = self.time_at(tsc);
        self.with_board(|board| board.console_input(bytes, now))
            .unwrap_or(0)
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.with_board(Board::power_button);
    }

    /// Bytes of the tables that map its RAM.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        self.memory().map_or(0, |memory| memory.table_bytes())
    }

    /// Raises a non-maskable interrupt at every vCPU, as a dump button does.
    pub fn inject_nmi(&self) {
        for vcpu in 0..self.vcpus() {
            self.fabric.inject_nmi(vcpu);
        }
    }

    /// The VM's time when the machine's TSC reads `tsc`.
    #[inline(always)]
    pub(crate) fn time_at(&self, tsc: u64) -> Nanos {
        Nanos(self.clock.ticks_to_nanos(tsc.wrapping_sub(self.origin)))
    }

    /// The machine's TSC at or just after a time of the VM.
    #[inline]
    pub(crate) fn tsc_at(&self, time: Nanos) -> u64 {
        if time == Nanos::NEVER {
            return u64::MAX;
        }
        self.origin
            .saturating_add(self.clock.nanos_to_ticks(time.0))
            .saturating_add(1)
    }
}

/// A vCPU: the hardware's part, its local APIC, and what else belongs to it alone. The core that
/// runs it owns it.
pub struct Processor<V: Vcpu, P: PhysMemory, F: FrameSource> {
    pub(crate) vm: Arc<Vm<P, F>>,
    pub(crate) msrs: MsrState,
    /// The next deadline that was armed, in the VM's time; `None`: arm again.
    pub(crate) armed: Option<Nanos>,
    /// The TPR and threshold that the hardware knows.
    pub(crate) shown_tpr: (u8, u8),
    /// What the next entry must look at besides the local APIC.
    pub(crate) attention: Attention,
    /// Another vCPU asked that its next halt be none.
    pub(crate) kicked: bool,
    /// The machine's TSC when it had moved frames last.
    pub(crate) moved: u64,
    /// It left queues silent then, and is to look at them again.
    pub(crate) listens: bool,
    /// How long it was kept from running, in nanoseconds.
    pub(crate) stolen: u64,
    /// What the guest was told of that, and whether it was being preempted.
    pub(crate) stolen_shown: Option<(u64, bool)>,
    /// How the VM ended, on the way out of the run loop.
    pub(crate) end: Option<End>,
    /// Where the guest's code was found last.
    pub(crate) code_page: CodePage,
    pub(crate) counts: Counts,
    /// What others know of them.
    pub(crate) exits: Arc<Exits>,
    pub(crate) apic: LocalApic,
    pub(crate) vcpu: V,
}

bitflags::bitflags! {
    /// Why an entry is not the plain case.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Attention: u8 {
        /// An interrupt window was asked for.
        const WINDOW = 1 << 0;
        /// The vCPU executed HLT.
        const HALTED = 1 << 1;
        /// The vCPU waits for a start-up.
        const WAITS = 1 << 2;
        /// The 8259 may have an interrupt for it.
        const EXTINT = 1 << 3;
        /// Others may have got something of it.
        const KICKS = 1 << 4;
        /// The board wants something of the host.
        const ACTIONS = 1 << 5;
        /// Silent queues of the network cards are to be looked at.
        const FRAMES = 1 << 6;
        /// The preparation of the next entry is to fail.
        #[cfg(feature = "fault-injection")]
        const FAULT = 1 << 7;
    }
}

impl<V: Vcpu, P: PhysMemory, F: FrameSource> Processor<V, P, F> {
    /// Makes the vCPU with this number, the next of its VM. Of an error nothing is left.
    ///
    /// # Errors
    /// The backend cannot make it.
    pub fn new(
        vm: &Arc<Vm<P, F>>,
        id: u32,
        entry: &EntryState,
        make: MakeVcpu<'_, V>,
    ) -> Result<Self, VmError> {
        let features = vm.cpuid.features();
        let mut apic = LocalApic::new(id, id == 0, features.phys_bits, vm.clock);
        if id == 0 {
            apic.virtual_wire();
        }
        vm.fabric.publish(&mut apic);
        let root = vm
            .memory()
            .map_err(|Over| VmError::Vcpu(String::new()))?
            .root();
        let mut vcpu = make(VcpuParts {
            id,
            root,
            apic_page: apic.page_ptr(),
            cr4: features.cr4,
        })
        .map_err(VmError::Vcpu)?;
        vcpu.set_tsc_offset(0u64.wrapping_sub(vm.origin));
        vcpu.set_apic_mode(arch::ApicMode::XApic);
        // Others than the first wait to be started up.
        let attention = if id == 0 {
            entry.apply(&mut vcpu);
            Attention::EXTINT
        } else {
            vm.deaf.fetch_or(1 << (id & 63), SeqCst);
            Attention::WAITS
        };
        // Nobody runs yet who could miss them.
        let _ = vm.take_kicks();
        Ok(Self {
            msrs: MsrState::new(features),
            vm: vm.clone(),
            armed: None,
            shown_tpr: (0, 0),
            attention,
            kicked: false,
            moved: 0,
            listens: false,
            stolen: 0,
            stolen_shown: None,
            end: None,
            code_page: CodePage::NONE,
            counts: Counts::default(),
            exits: Arc::default(),
            apic,
            vcpu,
        })
    }

    /// The VM that it belongs to.
    #[must_use]
    pub const fn vm(&self) -> &Arc<Vm<P, F>> {
        &self.vm
    }

    /// Takes it apart, for the backend to have its part back.
    #[must_use]
    pub fn into_vcpu(self) -> V {
        self.vcpu
    }

    /// Its number in the VM.
    #[must_use]
    pub const fn id(&self) -> usize {
        self.apic.id() as usize
    }

    /// Its exits up to its last turn.
    #[must_use]
    pub const fn exits(&self) -> &Arc<Exits> {
        &self.exits
    }

    /// What it stands at. It must be off all cores, and no other may be loaded on the calling one.
    pub fn dump(&mut self) -> Dump {
        self.vcpu.load();
        let mut dump = match self.vm.memory() {
            Ok(mut memory) => Dump::of(&self.vcpu, Some(&mut *memory)),
            Err(Over) => Dump::of(&self.vcpu, None),
        };
        let [requested, in_service] = self.apic.highest();
        dump.interrupts = Interrupts {
            tpr: self.apic.tpr(),
            requested,
            in_service,
            signalled: self.vm.fabric.is_signalled(self.id()),
            event: self.vcpu.pending_event().is_some(),
            halted: self.attention.contains(Attention::HALTED),
            waits: self.attention.contains(Attention::WAITS),
        };
        self.vcpu.unload();
        dump
    }

    /// Puts the vCPU's state on the calling core. It has been kept from running for `stolen`
    /// nanoseconds so far. `crowded`: there are more vCPUs than cores, so that one which spins, and
    /// perhaps for a sibling that has no core, gives up its turn.
    pub fn load(&mut self, stolen: u64, crowded: bool) {
        self.vcpu.load();
        self.vcpu.set_pause_exiting(crowded && self.vm.vcpus() > 1);
        self.stolen = stolen;
        // A VM that is given up has no use for it.
        let _ = self.show_stolen(false);
    }

    /// Takes the vCPU's state off the core, which another may have `preempted` it from.
    pub fn unload(&mut self, preempted: bool) {
        let _ = self.show_stolen(preempted);
        self.vcpu.unload();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::pack;
    use crate::load::Problem;
    use crate::load::tests::{elf, notes};
    use crate::testing::{KERNEL, Machine, parse};
    use alloc::string::ToString;
    use arch::GuestMemory;
    use machine::mock::MockVcpu;

    /// A kernel of one and a module of two pieces and a bit, and what each piece holds.
    fn archive() -> Vec<u8> {
        let code: Vec<u8> = (0..150_000u32).map(|i| ((i * 7) >> 3) as u8 | 1).collect();
        let note = notes(KERNEL + 0x800, true);
        let loads = [(1, KERNEL + 0x800, 0x4_0000, &code[..]), (4, 0, 0, &note)];
        let module: Vec<u8> = (0..140_000u32).map(|i| ((i * 5) >> 2) as u8).collect();
        let kernel = elf(true, 0, KERNEL + 0x800, &loads);
        pack(&[("kernel", &kernel), ("module", &module)]).unwrap()
    }

    const KEYS: &str = "initrd = \"module\"\nvcpus = 3";

    #[test]
    fn a_vm_is_made_in_pieces_and_none_of_them_is_missing() {
        let (machine, archive) = (Machine::new(), archive());
        let (config, bundle) = (parse(KEYS), Bundle::open(&archive).unwrap());
        let size: usize = ["kernel", "module"]
            .map(|name| Bundle::open(&archive).unwrap().get(name).unwrap().len())
            .iter()
            .sum();
        let checks = (1..).find(|_| check_images(&config, &bundle).unwrap());
        let most = size / CHECKED + 2;
        assert!((most - 2..=most).contains(&checks.unwrap()), "{checks:?}");
        assert_eq!(check_images(&config, &bundle), Ok(true));

        let mut making = machine.begin(&config, &bundle).unwrap();
        let steps = (1..).find(|_| making.step().unwrap()).unwrap();
        assert_eq!(steps, 3 + 3);
        assert_eq!(making.step(), Ok(true));
        let (vm, _) = making.finish();
        let mut memory = vm.memory().unwrap();
        let mut found = alloc::vec![0; 150_000];
        memory
            .read(GuestPhysAddr::new(KERNEL + 0x800), &mut found)
            .unwrap();
        assert!((0..150_000u32).all(|i| found[i as usize] == ((i * 7) >> 3) as u8 | 1));
        // A module of PVH lies as high as it can.
        let at = (16u64 << 20) - 140_000u64.next_multiple_of(4096);
        let module = &mut found[..140_000];
        memory.read(GuestPhysAddr::new(at), module).unwrap();
        assert!((0..140_000u32).all(|i| module[i as usize] == ((i * 5) >> 2) as u8));
    }

    #[test]
    fn a_vm_given_up_at_any_step_gives_back_all_that_it_held() {
        let (machine, archive) = (Machine::new(), archive());
        let (config, bundle) = (parse(KEYS), Bundle::open(&archive).unwrap());
        for steps in 0..=6 {
            let mut making = machine.begin(&config, &bundle).unwrap();
            for _ in 0..steps {
                making.step().unwrap();
            }
            assert!(machine.free_bytes() < machine.total);
            drop(making);
            assert_eq!(machine.free_bytes(), machine.total, "after {steps} steps");
        }
        for vcpus in 0..=3 {
            let mut making = machine.begin(&config, &bundle).unwrap();
            while !making.step().unwrap() {}
            let (vm, entry) = making.finish();
            let make = &mut |_| Ok(MockVcpu::protected());
            let made: Vec<_> = (0..vcpus)
                .map(|id| Processor::new(&vm, id, &entry, make).unwrap())
                .collect();
            assert_eq!(vm.take_kicks(), 0);
            drop((vm, made));
            assert_eq!(machine.free_bytes(), machine.total, "with {vcpus} vCPUs");
        }
        // Piece by piece, as a large one goes.
        let mut making = machine.begin(&config, &bundle).unwrap();
        while !making.step().unwrap() {}
        let (vm, _) = making.finish();
        while !vm.give_back() {}
        assert_eq!(vm.backed_bytes(), 0);
        drop(vm);
        assert_eq!(machine.free_bytes(), machine.total);
    }

    #[test]
    fn a_machine_that_runs_out_of_memory_says_for_which_image() {
        let archive = archive();
        let (config, bundle) = (parse(KEYS), Bundle::open(&archive).unwrap());
        let mut named = Vec::new();
        // Others take what was promised, piece by piece.
        for left in 1..80 {
            let mut machine = Machine::of(20 << 20);
            let mut making = machine.begin(&config, &bundle).unwrap();
            while machine.free_bytes() > left << 12 {
                machine.frames.allocate(arch::PageSize::Size4K).unwrap();
            }
            let taken = machine.free_bytes();
            let result = loop {
                match making.step() {
                    Ok(false) => {}
                    other => break other,
                }
            };
            let Err(error) = result else { continue };
            let VmError::Load(LoadError { image, problem }) = &error else {
                panic!("{error}");
            };
            assert!(matches!(
                problem,
                Problem::Memory(MemoryFault::OutOfMemory(_))
            ));
            assert!(error.to_string().contains("no free frame"));
            if named.last() != Some(image) {
                named.push(image.clone());
            }
            drop(making);
            assert!(machine.free_bytes() > taken);
        }
        assert_eq!(named, ["kernel", "module"]);
    }
}
