//! A vCPU and guest memory as plain structs, for host tests of everything that is handed an
//! [`arch::Vcpu`] or an [`arch::GuestMemory`].

extern crate alloc;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec;
use alloc::vec::Vec;

use arch::{
    AccessRights, Combined, ControlRegister, Cr0, Cr4, DebugRegister, DescriptorTable, Efer, Event,
    Exit, Gprs, GuestMemory, GuestPhysAddr, HostPhysAddr, Interruptibility, IoExit, MemoryFault,
    RFlags, Segment, SegmentRegister, Vcpu,
};

/// A vCPU whose every register is a field. It never runs: [`Vcpu::enter`] gives what its script
/// says, and then [`Exit::Benign`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct MockVcpu {
    pub gprs: Gprs,
    pub rsp: u64,
    pub rip: u64,
    /// What the "hardware" tells.
    pub next_rip: Option<u64>,
    pub rflags: RFlags,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    /// DR0 to DR7.
    pub dr: [u64; 8],
    /// Indexed by [`SegmentRegister`].
    pub segments: [Segment; 8],
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub efer: u64,
    pub xcr0: u64,
    /// The MSRs of [`arch::msr::VCPU_STATE`] that were written.
    pub msrs: BTreeMap<u32, u64>,
    pub interruptibility: Interruptibility,
    /// The event queued for the next entry.
    pub pending: Option<Event>,
    pub interrupt_window: bool,
    pub nmi_window: bool,
    pub tsc_offset: u64,
    pub deadline: u64,
    /// How often the nested tables' translations were dropped.
    pub flushes: u32,
    /// What the next entries come back with.
    pub exits: VecDeque<Exit>,
    /// What [`Vcpu::rare_exit`] gives.
    pub rare: Exit,
    /// The events that entries delivered.
    pub delivered: Vec<Event>,
    /// Whether it has a timer of its own.
    pub own_timer: bool,
    /// What PAE paging was given.
    pub pdptes: Option<[u64; 4]>,
}

/// Present code segment, readable, accessed.
const CODE: u32 = 0x9b;
/// Present data segment, writable, accessed.
const DATA: u32 = 0x93;

impl MockVcpu {
    /// Real mode, all segments at zero with 64 KiB.
    #[must_use]
    pub fn real() -> Self {
        let data = Segment {
            selector: 0,
            rights: AccessRights(DATA),
            limit: 0xffff,
            base: 0,
        };
        Self {
            gprs: Gprs::default(),
            rsp: 0,
            rip: 0,
            next_rip: None,
            rflags: RFlags::FIXED,
            cr0: Cr0::ET.bits(),
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            segments: [data; 8],
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            efer: 0,
            xcr0: 1,
            msrs: BTreeMap::new(),
            interruptibility: Interruptibility {
                interrupts_open: true,
                nmi_open: true,
            },
            pending: None,
            interrupt_window: false,
            nmi_window: false,
            tsc_offset: 0,
            deadline: u64::MAX,
            flushes: 0,
            exits: VecDeque::new(),
            rare: Exit::Benign,
            delivered: Vec::new(),
            own_timer: true,
            pdptes: None,
        }
    }

    /// 32-bit protected mode, level 0, flat segments, no paging.
    #[must_use]
    pub fn protected() -> Self {
        let mut vcpu = Self::real();
        vcpu.cr0 |= Cr0::PE.bits();
        for segment in &mut vcpu.segments {
            segment.rights = AccessRights(DATA | 0xc000);
            segment.limit = u32::MAX;
        }
        vcpu.segments[SegmentRegister::Cs as usize].rights = AccessRights(CODE | 0xc000);
        vcpu
    }

    /// 64-bit mode, level 0, with 4-level tables whose root is at `cr3`.
    #[must_use]
    pub fn long(cr3: u64) -> Self {
        let mut vcpu = Self::protected();
        vcpu.cr0 |= (Cr0::PG | Cr0::WP).bits();
        vcpu.cr3 = cr3;
        vcpu.cr4 |= Cr4::PAE.bits();
        vcpu.efer = (Efer::LME | Efer::LMA | Efer::NXE).bits();
        vcpu.segments[SegmentRegister::Cs as usize].rights = AccessRights(CODE | 0xa000);
        vcpu
    }

    /// The same at this privilege level.
    #[must_use]
    pub fn at_cpl(mut self, cpl: u8) -> Self {
        for register in [SegmentRegister::Cs, SegmentRegister::Ss] {
            let rights = &mut self.segments[register as usize].rights;
            rights.0 = rights.0 & !0x60 | u32::from(cpl & 3) << 5;
        }
        self
    }
}

impl Vcpu for MockVcpu {
    fn load(&mut self) {}
    fn unload(&mut self) {}
    fn enter(&mut self) -> Exit {
        self.delivered.extend(self.pending.take());
        let exit = self.exits.pop_front().unwrap_or(Exit::Benign);
        match exit {
            Exit::Cpuid
            | Exit::Hypercall
            | Exit::Rdmsr
            | Exit::Wrmsr
            | Exit::Io(IoExit { string: false, .. })
            | Exit::NestedFault { .. }
            | Exit::ApicWrite { .. }
            | Exit::Hlt
            | Exit::ExternalInterrupt(_)
            | Exit::InterruptWindow
            | Exit::PreemptionTimer => exit,
            _ => {
                self.rare = exit;
                Exit::Rare
            }
        }
    }
    fn rare_exit(&self) -> Exit {
        self.rare
    }
    fn gprs(&self) -> &Gprs {
        &self.gprs
    }
    fn gprs_mut(&mut self) -> &mut Gprs {
        &mut self.gprs
    }
    fn rsp(&self) -> u64 {
        self.rsp
    }
    fn set_rsp(&mut self, value: u64) {
        self.rsp = value;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }
    fn next_rip(&self) -> Option<u64> {
        self.next_rip
    }
    fn rflags(&self) -> RFlags {
        self.rflags
    }
    fn set_rflags(&mut self, value: RFlags) {
        self.rflags = value | RFlags::FIXED;
    }
    fn cr(&self, register: ControlRegister) -> u64 {
        match register {
            ControlRegister::Cr0 => self.cr0,
            ControlRegister::Cr2 => self.cr2,
            ControlRegister::Cr3 => self.cr3,
            ControlRegister::Cr4 => self.cr4,
            ControlRegister::Cr8 => self.cr8,
        }
    }
    fn set_cr(&mut self, register: ControlRegister, value: u64) {
        match register {
            ControlRegister::Cr0 => self.cr0 = value,
            ControlRegister::Cr2 => self.cr2 = value,
            ControlRegister::Cr3 => self.cr3 = value,
            ControlRegister::Cr4 => self.cr4 = value,
            ControlRegister::Cr8 => self.cr8 = value,
        }
    }
    fn dr(&self, register: DebugRegister) -> u64 {
        self.dr[debug_slot(register)]
    }
    fn set_dr(&mut self, register: DebugRegister, value: u64) {
        self.dr[debug_slot(register)] = value;
    }
    fn segment(&self, register: SegmentRegister) -> Segment {
        self.segments[register as usize]
    }
    fn set_segment(&mut self, register: SegmentRegister, value: Segment) {
        self.segments[register as usize] = value;
    }
    fn gdtr(&self) -> DescriptorTable {
        self.gdtr
    }
    fn set_gdtr(&mut self, value: DescriptorTable) {
        self.gdtr = value;
    }
    fn idtr(&self) -> DescriptorTable {
        self.idtr
    }
    fn set_idtr(&mut self, value: DescriptorTable) {
        self.idtr = value;
    }
    fn efer(&self) -> u64 {
        self.efer
    }
    fn set_efer(&mut self, value: u64) {
        self.efer = value;
    }
    fn msr(&self, index: u32) -> Option<u64> {
        let known = arch::msr::VCPU_STATE.contains(&index);
        known.then(|| self.msrs.get(&index).copied().unwrap_or(0))
    }
    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let known = arch::msr::VCPU_STATE.contains(&index);
        if known {
            self.msrs.insert(index, value);
        }
        known
    }
    fn xcr0(&self) -> u64 {
        self.xcr0
    }
    fn set_xcr0(&mut self, value: u64) {
        self.xcr0 = value;
    }
    fn interruptibility(&self) -> Interruptibility {
        Interruptibility {
            interrupts_open: self.interruptibility.interrupts_open && self.pending.is_none(),
            nmi_open: self.interruptibility.nmi_open && self.pending.is_none(),
        }
    }
    fn inject(&mut self, event: Event) -> bool {
        match arch::combine(self.pending, event) {
            Combined::Deliver(event) => {
                self.pending = Some(event);
                true
            }
            Combined::TripleFault => false,
        }
    }
    fn pending_event(&self) -> Option<Event> {
        self.pending
    }
    fn request_interrupt_window(&mut self, on: bool) {
        self.interrupt_window = on;
    }
    fn request_nmi_window(&mut self, on: bool) {
        self.nmi_window = on;
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
    }
    fn set_deadline(&mut self, tsc: u64) -> bool {
        self.deadline = tsc;
        self.own_timer
    }
    fn flush_nested(&mut self, _root: HostPhysAddr) {
        self.flushes += 1;
    }
    fn set_pdptes(&mut self, entries: [u64; 4]) {
        self.pdptes = Some(entries);
    }
    fn virtual_tpr(&self) -> Option<u8> {
        None
    }
    fn set_virtual_tpr(&mut self, _tpr: u8, _threshold: u8) {}
    fn reset(&mut self) {
        *self = Self::real();
        self.rip = 0xfff0;
        let cs = &mut self.segments[SegmentRegister::Cs as usize];
        cs.selector = 0xf000;
        cs.base = 0xffff_0000;
        cs.rights = AccessRights(CODE);
    }
    fn init(&mut self) {
        let xcr0 = self.xcr0;
        self.reset();
        self.xcr0 = xcr0;
    }
}

const fn debug_slot(register: DebugRegister) -> usize {
    match register {
        DebugRegister::Dr4 => 6,
        DebugRegister::Dr5 => 7,
        other => other as usize,
    }
}

/// RAM from address 0 on, with one optional range of ROM; what lies beyond is not RAM.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct FlatMemory {
    pub ram: Vec<u8>,
    pub rom: core::ops::Range<u64>,
    /// Where [`FlatMemory::map`] takes its next table.
    pub next_table: u64,
    /// How many accesses were made.
    pub accesses: u32,
}

impl FlatMemory {
    /// `bytes` of zeroed RAM. [`FlatMemory::map`] takes tables from 1 MiB up.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self {
            ram: vec![0; bytes],
            rom: 0..0,
            next_table: 1 << 20,
            accesses: 0,
        }
    }

    /// A new page for a table.
    pub fn table(&mut self) -> u64 {
        let table = self.next_table;
        self.next_table += 4096;
        table
    }

    /// Maps a 4 KiB page in 4-level tables: `flags` are the leaf entry's low and high bits, upper
    /// entries allow everything. Accessed and dirty bits are left to the walker.
    pub fn map(&mut self, cr3: u64, linear: u64, physical: u64, flags: u64) {
        let mut table = cr3;
        for shift in [39, 30, 21] {
            let at = table + (linear >> shift & 0x1ff) * 8;
            let mut entry = self.u64(at);
            if entry & 1 == 0 {
                entry = self.table() | 7;
                self.set_u64(at, entry);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        self.set_u64(table + (linear >> 12 & 0x1ff) * 8, physical | flags);
    }

    /// Reads a u64 that is known to be RAM.
    #[must_use]
    pub fn u64(&self, at: u64) -> u64 {
        let at = at as usize;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.ram[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// Writes a u64 to what is known to be RAM.
    pub fn set_u64(&mut self, at: u64, value: u64) {
        self.load(at, &value.to_le_bytes());
    }

    /// Puts bytes into what is known to be RAM.
    pub fn load(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.ram[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn slice(&mut self, addr: GuestPhysAddr, len: usize) -> Result<&mut [u8], MemoryFault> {
        self.accesses += 1;
        let size = self.ram.len();
        let start = usize::try_from(addr.as_u64()).unwrap_or(usize::MAX);
        let missing = GuestPhysAddr::new(addr.as_u64().max(size as u64));
        start
            .checked_add(len)
            .and_then(|end| self.ram.get_mut(start..end))
            .ok_or(MemoryFault::NotRam(missing))
    }
}

impl GuestMemory for FlatMemory {
    fn read(&mut self, addr: GuestPhysAddr, buf: &mut [u8]) -> Result<(), MemoryFault> {
        let bytes = self.slice(addr, buf.len())?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write(&mut self, addr: GuestPhysAddr, data: &[u8]) -> Result<(), MemoryFault> {
        if self.rom.contains(&addr.as_u64()) {
            return Err(MemoryFault::ReadOnly(addr));
        }
        self.slice(addr, data.len())?.copy_from_slice(data);
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        addr: GuestPhysAddr,
        size: u8,
        current: u64,
        new: u64,
    ) -> Result<u64, MemoryFault> {
        if self.rom.contains(&addr.as_u64()) {
            return Err(MemoryFault::ReadOnly(addr));
        }
        let bytes = self.slice(addr, size.into())?;
        let mut found = [0; 8];
        found[..bytes.len()].copy_from_slice(bytes);
        let found = u64::from_le_bytes(found);
        if found == current {
            bytes.copy_from_slice(&new.to_le_bytes()[..usize::from(size)]);
        }
        Ok(found)
    }
}
