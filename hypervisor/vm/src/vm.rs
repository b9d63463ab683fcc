//! One VM: its configuration made into an address space, a virtual PC and a vCPU.

use crate::bundle::{Bundle, BundleError};
use crate::config::{Class, ImageName, VmConfig};
use crate::layout::MemoryLayout;
use crate::load::{self, Boot, EntryState, Image, LoadError};
use alloc::string::String;
use alloc::vec::Vec;
use arch::{FrameSource, GuestPhysAddr, HostPhysAddr, MemoryFault, Nanos, PhysMemory, Vcpu};
use core::fmt;
use machine::acpi::{self, AcpiConfig};
use machine::board::{Board, BoardConfig};
use machine::clock::TscClock;
use machine::cpuid::{CpuidConfig, CpuidPolicy, Enabled};
use machine::emulate::CodePage;
use machine::map;
use machine::msr::MsrState;
use memory::{AddressSpace, Format, MapError, Region, RegionError, RegionKind};

/// What a running VM needs of the core it runs on.
pub trait Host {
    /// The core's TSC.
    fn tsc(&self) -> u64;
    /// Takes the core back when its TSC reaches this value (`u64::MAX`: no need to).
    fn arm(&mut self, deadline: u64);
    /// Serves the machine's interrupts that wait. `true`: the core is wanted for something else.
    fn interrupted(&mut self) -> bool;
    /// Shows what the guest wrote on its console.
    fn output(&mut self, bytes: &[u8]);
}

/// Why a VM gave the core back.
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
    /// It is over.
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
    /// The backend cannot make the vCPU.
    #[error("vCPU: {0}")]
    Vcpu(String),
}

/// What a VM is made from.
pub struct VmSetup<'a, P, F> {
    /// Its section of the configuration.
    pub config: &'a VmConfig,
    /// Where its images are.
    pub bundle: &'a Bundle<'a>,
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
    /// A page to map at the local APIC's address (VMX), if the hardware wants one.
    pub apic_access_page: Option<HostPhysAddr>,
}

/// Makes the vCPU, given the root of the nested tables, the local APIC's register page, and the
/// bits of CR4 that CPUID allows.
pub type MakeVcpu<'a, V> = &'a mut dyn FnMut(HostPhysAddr, *const u8, u64) -> Result<V, String>;

fn image<'a>(bundle: &Bundle<'a>, image: &'a ImageName) -> Result<Image<'a>, BundleError> {
    Ok(Image {
        name: &image.name,
        data: bundle.get(&image.name)?,
    })
}

/// What a VM costs the host besides its RAM and the tables that map it, with room to spare:
/// devices, vCPU, upper page tables.
const OVERHEAD: u64 = 256 << 10;

/// What the lower tables of this much RAM take when all of it is backed by base pages.
const fn tables_for(memory: u64) -> u64 {
    memory / 512 + memory / (512 * 512)
}

/// A virtual machine. What is rare or cold works on a `Vm<dyn Vcpu, …>`, so that it is there once
/// and not once for each vendor.
pub struct Vm<V: Vcpu + ?Sized, P: PhysMemory, F: FrameSource> {
    // Fields in the order in which an exit touches them, but for the vCPU.
    pub(crate) cpuid: CpuidPolicy,
    pub(crate) msrs: MsrState,
    /// Converts between TSC ticks and the VM's time; its base stays 0.
    pub(crate) clock: TscClock,
    /// The machine's TSC at the VM's time zero.
    pub(crate) origin: u64,
    /// The next deadline that was armed, in the VM's time; `None`: arm again.
    pub(crate) armed: Option<Nanos>,
    /// The TPR and threshold that the hardware knows.
    pub(crate) shown_tpr: (u8, u8),
    /// An interrupt or NMI window was asked for.
    pub(crate) window: bool,
    /// The vCPU executed HLT.
    pub(crate) halted: bool,
    pub(crate) stop: bool,
    /// How the VM ended, on the way out of the run loop.
    pub(crate) end: Option<End>,
    /// Where the guest's code was found last.
    pub(crate) code_page: CodePage,
    pub(crate) board: Board,
    pub(crate) memory: AddressSpace<P, F>,
    /// Accesses to MSRs that do not exist, for the log's rate limit.
    pub(crate) unknown_msrs: u32,
    /// The wall clock at the VM's time zero, in nanoseconds since 1970 UTC.
    pub(crate) epoch: u64,
    pub(crate) apic_access_page: Option<HostPhysAddr>,
    pub(crate) name: String,
    /// Last, as the language wants it for a `Vm<dyn Vcpu, …>`.
    pub(crate) vcpu: V,
}

/// What of a VM has nothing to do with its vCPU's kind.
struct Parts<P: PhysMemory, F: FrameSource> {
    cpuid: CpuidPolicy,
    clock: TscClock,
    board: Board,
    memory: AddressSpace<P, F>,
    entry: EntryState,
}

impl<P: PhysMemory, F: FrameSource> Parts<P, F> {
    fn new(setup: VmSetup<'_, P, F>) -> Result<Self, VmError> {
        let VmSetup { config, bundle, .. } = setup;
        let overhead = OVERHEAD + tables_for(config.memory);
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
        let board = Board::new(&BoardConfig {
            vcpus: config.vcpus,
            phys_bits: cpuid.features().phys_bits,
            clock,
            low_ram: config.memory - high_ram,
            high_ram,
            hpet: true,
            wall_clock: setup.wall_clock,
            debug_exit: config.devices.debug_exit,
            debug_console: config.devices.debug_console,
            watchdog: config.devices.watchdog,
        });
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
        let entry = load::load(&boot, &layout, &mut memory, rsdp)?;
        Ok(Self {
            cpuid,
            clock,
            board,
            memory,
            entry,
        })
    }
}

impl<V: Vcpu, P: PhysMemory, F: FrameSource> Vm<V, P, F> {
    /// Builds the VM up to the point where its first instruction can run.
    ///
    /// # Errors
    /// What stands in the way; nothing is left behind.
    pub fn new(setup: VmSetup<'_, P, F>, make_vcpu: MakeVcpu<'_, V>) -> Result<Self, VmError> {
        let (tsc, epoch) = (setup.tsc, setup.wall_clock);
        let (apic_access_page, name) = (setup.apic_access_page, setup.config.name.clone());
        let Parts {
            cpuid,
            clock,
            board,
            memory,
            entry,
        } = Parts::new(setup)?;
        let apic_page = board.apic.local[0].page_ptr();
        let mut vcpu =
            make_vcpu(memory.root(), apic_page, cpuid.features().cr4).map_err(VmError::Vcpu)?;
        entry.apply(&mut vcpu);
        vcpu.set_tsc_offset(0u64.wrapping_sub(tsc));
        vcpu.set_apic_mode(arch::ApicMode::XApic);
        Ok(Self {
            msrs: MsrState::new(cpuid.features()),
            cpuid,
            clock,
            origin: tsc,
            armed: None,
            shown_tpr: (0, 0),
            window: false,
            halted: false,
            stop: false,
            end: None,
            code_page: CodePage::NONE,
            board,
            memory,
            unknown_msrs: 0,
            epoch,
            apic_access_page,
            name,
            vcpu,
        })
    }

    /// Takes the VM apart: its memory goes back, and its vCPU to the backend.
    #[must_use]
    pub fn into_vcpu(self) -> V {
        self.vcpu
    }
}

impl<V: Vcpu + ?Sized, P: PhysMemory, F: FrameSource> Vm<V, P, F> {
    /// Puts the vCPU's state on the calling core.
    pub fn load(&mut self) {
        self.vcpu.load();
    }

    /// Takes the vCPU's state off the core.
    pub fn unload(&mut self) {
        self.vcpu.unload();
    }

    /// Bytes of RAM that have a frame.
    #[must_use]
    pub const fn backed_bytes(&self) -> u64 {
        self.memory.backed_bytes()
    }

    /// Bytes of RAM that the guest was promised.
    #[must_use]
    pub fn promised_bytes(&self) -> u64 {
        self.memory.promised_bytes()
    }

    /// Bytes of host memory that the VM may still come to take, page tables included.
    #[must_use]
    pub fn outstanding_bytes(&self) -> u64 {
        let promised = self.memory.promised_bytes();
        let taken = self.memory.backed_bytes() + self.memory.table_bytes();
        (promised + tables_for(promised) + OVERHEAD).saturating_sub(taken)
    }

    /// Types on the guest's console when the machine's TSC reads `tsc`; gives how many bytes it
    /// took.
    pub fn input(&mut self, bytes: &[u8], tsc: u64) -> usize {
        let now = self.time_at(tsc);
        self.board.console_input(bytes, now)
    }

    /// Presses the power button.
    pub fn power_button(&mut self) {
        self.board.power_button();
    }

    /// Ends the VM at its next turn.
    pub const fn stop(&mut self) {
        self.stop = true;
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
