//! The two vendors' ways to make VMs, behind one trait: the wall between the run loop and `cpu`.
//! What an exit does is compiled for each vendor; all else is there once.

use crate::bring_up::{Host, host_page, host_pages};
use crate::frames::Frames;
use crate::run::CoreHost;
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use arch::{Cr4, FrameSource, HostPhysAddr, PageSize, Vcpu};
use cpu::page::HostPage;
use cpu::svm::{Svm, SvmBitmaps, SvmCaps, SvmConfig, SvmFeatures, SvmVcpu};
use cpu::virt::{Extension, VirtUnavailable};
use cpu::vmx::{Vmx, VmxCaps, VmxConfig, VmxPages, VmxVcpu};
use cpu::xstate::XStateCaps;
use hw::DirectMap;
use machine::cpuid::Enabled;
use memory::Format;
use vm::dump::Dump;
use vm::exits::Exits;
use vm::load::EntryState;
use vm::{MakeVcpu, Processor, Stop, VcpuParts, Vm, VmError, VmSetup};

/// One vendor's way to make VMs.
pub trait Backend: Sync {
    /// Turns the extension on for the calling core, which is not the boot core, and makes it ready
    /// for guests' extended state.
    ///
    /// # Errors
    /// Why not; among others that the core is unlike the boot core.
    fn enable_core(&self, map: DirectMap) -> Result<(), VirtUnavailable>;
    /// The format of its nested tables.
    fn format(&self) -> Format;
    /// What its guests may use of the machine.
    fn enabled(&self) -> Enabled;
    /// A page to map at the local APIC's address in every guest, if the hardware wants one.
    fn apic_access_page(&self) -> Option<HostPhysAddr>;
    /// A VM's vCPU `id`, with this number in the machine; the first starts as `entry` says.
    ///
    /// # Errors
    /// See [`Processor::new`].
    fn vcpu(
        &self,
        host: &Host,
        number: u16,
        vm: &Arc<AnyVm>,
        id: u32,
        entry: &EntryState,
    ) -> Result<Box<dyn Guest>, VmError>;
}

/// What a VM is made from.
pub type Setup<'a> = VmSetup<'a, 'static, DirectMap, Frames>;
/// What the vCPUs of a VM share.
pub type AnyVm = Vm<DirectMap, Frames>;

/// A vCPU on the heap. Only what is called once a turn goes through here; what happens at an exit
/// knows the vendor.
pub trait Guest: Send {
    /// See [`Processor::load`].
    fn load(&mut self, stolen: u64, crowded: bool);
    /// See [`Processor::unload`].
    fn unload(&mut self, preempted: bool);
    /// See [`Processor::run`].
    fn run(&mut self, host: &mut CoreHost<'_>) -> Stop;
    /// See [`Processor::exits`].
    fn exits(&self) -> Arc<Exits>;
    /// See [`Processor::dump`].
    fn dump(&mut self) -> Dump;
    /// Gives everything it holds back.
    fn destroy(self: Box<Self>);
}

impl<V: OwnsPages + Send + 'static> Guest for Processor<V, DirectMap, Frames> {
    fn load(&mut self, stolen: u64, crowded: bool) {
        self.load(stolen, crowded);
    }
    fn unload(&mut self, preempted: bool) {
        self.unload(preempted);
    }
    fn run(&mut self, host: &mut CoreHost<'_>) -> Stop {
        self.run(host)
    }
    fn exits(&self) -> Arc<Exits> {
        self.exits().clone()
    }
    fn dump(&mut self) -> Dump {
        self.dump()
    }
    fn destroy(self: Box<Self>) {
        self.into_vcpu().give_back();
    }
}

fn boxed<V: OwnsPages + Send + 'static>(
    vm: &Arc<AnyVm>,
    id: u32,
    entry: &EntryState,
    make: MakeVcpu<'_, V>,
) -> Result<Box<dyn Guest>, VmError> {
    Ok(Box::new(Processor::new(vm, id, entry, make)?))
}

/// A vCPU that holds pages of the machine.
pub trait OwnsPages: Vcpu {
    /// Gives them back.
    fn give_back(self);
}

impl OwnsPages for VmxVcpu {
    fn give_back(self) {
        let VmxPages { vmcs, msr_bitmap } = self.into_pages();
        back(vmcs);
        back(msr_bitmap);
    }
}

impl OwnsPages for SvmVcpu {
    fn give_back(self) {
        back(self.into_page());
    }
}

/// Turns the machine's extension on, on this core.
pub fn enable(host: &Host) -> Result<Box<dyn Backend>, VirtUnavailable> {
    Ok(match cpu::virt::extension()? {
        Extension::Vmx => Box::new(VmxBackend::enable(host)?),
        Extension::Svm => Box::new(SvmBackend::enable(host)?),
    })
}

fn back(page: HostPage) {
    Frames.free(page.phys(), PageSize::Size4K);
}

fn pages<const N: usize>(map: DirectMap) -> Option<[HostPage; N]> {
    host_pages(map, N as u64)?.try_into().ok()
}

/// Two single pages: a whole run is hard to come by when memory is in pieces.
fn two_pages(map: DirectMap) -> Option<(HostPage, HostPage)> {
    let first = host_page(map)?;
    match host_page(map) {
        Some(second) => Some((first, second)),
        None => {
            back(first);
            None
        }
    }
}

fn unlike(extension: Extension) -> VirtUnavailable {
    VirtUnavailable::EnableFailed {
        extension,
        step: "the core's capabilities are not those of the boot core",
    }
}

fn out_of_memory(extension: Extension) -> VirtUnavailable {
    VirtUnavailable::EnableFailed {
        extension,
        step: "there is no memory for its control pages",
    }
}

/// Makes the core ready to move guests' extended state.
fn extended_state() -> XStateCaps {
    let mut xstate = XStateCaps::detect(cpu::xstate::KNOWN);
    // SAFETY: ring 0, the hypervisor itself uses no extended state, and no guest ran here yet.
    unsafe { xstate.enable() };
    xstate
}

/// Tells of what the processor cannot be trusted with.
fn tell(xstate: &XStateCaps) {
    if xstate.compacts_wrong() {
        log::warn!("XSAVEC puts components where XRSTOR does not look: guests are not offered it");
    }
}

/// What both vendors let guests use alike: it needs no control of theirs.
fn enabled(xstate: &XStateCaps) -> Enabled {
    let xcr0 = if xstate.has_xsave() { xstate.mask() } else { 0 };
    Enabled {
        xcr0,
        xsavec: xstate.compacts(),
        ..Enabled::default()
    }
}

/// Intel VT-x.
pub struct VmxBackend {
    caps: VmxCaps,
    xstate: XStateCaps,
    access_page: Option<HostPage>,
    _on: Vmx,
}

impl VmxBackend {
    fn enable(host: &Host) -> Result<Self, VirtUnavailable> {
        // SAFETY: ring 0.
        let caps = unsafe { Vmx::detect() }?;
        let region = host_page(host.map).ok_or(out_of_memory(Extension::Vmx))?;
        let xstate = extended_state();
        // SAFETY: the boot core, once, with a page of its own.
        let on = unsafe { Vmx::enable(&caps, region) }?;
        let features = caps.features();
        log::info!("VT-x: {features:?}");
        tell(&xstate);
        let access_page = features.contains(cpu::vmx::Features::APIC_ACCESSES);
        let access_page = access_page.then(|| host_page(host.map)).flatten();
        Ok(Self {
            caps,
            xstate,
            access_page,
            _on: on,
        })
    }

    fn create_vcpu(&self, host: &Host, number: u16, parts: &VcpuParts) -> Result<VmxVcpu, String> {
        let (vmcs, msr_bitmap) =
            two_pages(host.map).ok_or("there is no memory for its control pages")?;
        let frames = [vmcs.phys(), msr_bitmap.phys()];
        let cr4_guest = Cr4::from_bits_retain(parts.cr4) & VmxConfig::CR4_GUEST;
        let config = VmxConfig {
            ept_root: parts.root,
            vpid: number + 1,
            virtual_apic_page: Some(host.map.physical(parts.apic_page)),
            apic_access_page: self.apic_access_page(),
            cr4_guest,
            speculation_control: false,
            xstate: self.xstate,
        };
        // SAFETY: VMX and the extended state are on here; the pages are fresh; the tables and the
        // APIC page belong to the VM that will own the vCPU.
        unsafe { VmxVcpu::new(&self.caps, VmxPages { vmcs, msr_bitmap }, config) }.map_err(
            |error| {
                // The processor holds neither of them: it refused the first.
                for frame in frames {
                    Frames.free(frame, PageSize::Size4K);
                }
                error.to_string()
            },
        )
    }
}

impl Backend for VmxBackend {
    fn enable_core(&self, map: DirectMap) -> Result<(), VirtUnavailable> {
        // SAFETY: ring 0.
        let caps = unsafe { Vmx::detect() }?;
        if caps != self.caps || extended_state() != self.xstate {
            return Err(unlike(Extension::Vmx));
        }
        let region = host_page(map).ok_or(out_of_memory(Extension::Vmx))?;
        // SAFETY: this core, once, with a page of its own, for good.
        unsafe { Vmx::enable(&caps, region) }.map(drop)
    }

    fn format(&self) -> Format {
        Format::Ept
    }

    fn vcpu(
        &self,
        host: &Host,
        number: u16,
        vm: &Arc<AnyVm>,
        id: u32,
        entry: &EntryState,
    ) -> Result<Box<dyn Guest>, VmError> {
        boxed(vm, id, entry, &mut |parts| {
            self.create_vcpu(host, number, &parts)
        })
    }

    fn enabled(&self) -> Enabled {
        let features = self.caps.features();
        Enabled {
            rdtscp: features.contains(cpu::vmx::Features::RDTSCP),
            invpcid: features.contains(cpu::vmx::Features::INVPCID),
            xsaves: self.xstate.compacts() && features.contains(cpu::vmx::Features::XSAVES),
            ..enabled(&self.xstate)
        }
    }

    fn apic_access_page(&self) -> Option<HostPhysAddr> {
        self.access_page.as_ref().map(HostPage::phys)
    }
}

/// AMD-V.
pub struct SvmBackend {
    caps: SvmCaps,
    xstate: XStateCaps,
    bitmaps: &'static SvmBitmaps,
    _on: Svm,
}

impl SvmBackend {
    fn enable(host: &Host) -> Result<Self, VirtUnavailable> {
        let caps = Svm::detect()?;
        let missing = || out_of_memory(Extension::Svm);
        let (iopm, msrpm) = (
            pages(host.map).ok_or_else(missing)?,
            pages(host.map).ok_or_else(missing)?,
        );
        let bitmaps = SvmBitmaps::new(&caps, iopm, msrpm).map_err(|_| missing())?;
        let save = two_pages(host.map).ok_or_else(missing)?.into();
        let xstate = extended_state();
        // SAFETY: the boot core, once, with pages of its own.
        let on = unsafe { Svm::enable(&caps, save) }?;
        log::info!("AMD-V: {} ASIDs, {:?}", caps.asids, caps.features);
        tell(&xstate);
        Ok(Self {
            caps,
            xstate,
            bitmaps: Box::leak(Box::new(bitmaps)),
            _on: on,
        })
    }

    fn create_vcpu(&self, host: &Host, number: u16, root: HostPhysAddr) -> Result<SvmVcpu, String> {
        let vmcb = host_page(host.map).ok_or("there is no memory for its control block")?;
        let frame = vmcb.phys();
        // One tag each while they last; from the last one on they share it, and pay with flushes.
        let tags = self.caps.asids.saturating_sub(1).max(1);
        let config = SvmConfig {
            nested_root: root,
            asid: (1 + u32::from(number)).min(tags),
            asid_shared: 1 + u32::from(number) >= tags,
            bitmaps: self.bitmaps,
            xstate: self.xstate,
        };
        SvmVcpu::new(&self.caps, vmcb, config).map_err(|error| {
            Frames.free(frame, PageSize::Size4K);
            error.to_string()
        })
    }
}

impl Backend for SvmBackend {
    fn enable_core(&self, map: DirectMap) -> Result<(), VirtUnavailable> {
        let caps = Svm::detect()?;
        if caps != self.caps || extended_state() != self.xstate {
            return Err(unlike(Extension::Svm));
        }
        let save = two_pages(map).ok_or(out_of_memory(Extension::Svm))?.into();
        // SAFETY: this core, once, with pages of its own, for good.
        unsafe { Svm::enable(&caps, save) }.map(drop)
    }

    fn format(&self) -> Format {
        Format::Npt
    }

    fn vcpu(
        &self,
        host: &Host,
        number: u16,
        vm: &Arc<AnyVm>,
        id: u32,
        entry: &EntryState,
    ) -> Result<Box<dyn Guest>, VmError> {
        boxed(vm, id, entry, &mut |parts| {
            self.create_vcpu(host, number, parts.root)
        })
    }

    fn enabled(&self) -> Enabled {
        Enabled {
            rdtscp: self.caps.features.contains(SvmFeatures::TSC_AUX),
            // They run natively where the machine has them.
            invpcid: true,
            xsaves: self.xstate.compacts(),
            ..enabled(&self.xstate)
        }
    }

    fn apic_access_page(&self) -> Option<HostPhysAddr> {
        None
    }
}
