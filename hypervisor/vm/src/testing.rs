//! Random damage for tests, the same on every run; and a small machine on which a VM runs whose
//! vCPU follows a script.

use crate::bundle::{Bundle, pack};
use crate::config::{self, VmConfig};
use crate::load::tests::{elf, notes};
use crate::{Host, Making, Processor, Stop, VmError, VmSetup};
use alloc::rc::Rc;
use alloc::string::String;
use alloc::{vec, vec::Vec};
use arch::{Exit, FrameSource, HostPhysAddr, PageSize, PhysMemory};
use core::cell::RefCell;
use machine::cpuid::Enabled;
use machine::mock::MockVcpu;
use memory::{Format, FrameAllocator, FrameRange};
use virtio::net::Ask;

/// Marsaglia's xorshift.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    /// Changes up to four bytes of `image[start..start + length]`, and now and then cuts it off.
    pub(crate) fn damage(&mut self, image: &mut Vec<u8>, start: u64, length: u64) {
        const TELLING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xf0, 0xff];
        for _ in 0..=self.below(4) {
            let at = (start + self.below(length)) as usize;
            let value = match self.below(8) {
                n @ 0..6 => TELLING[n as usize],
                _ => self.below(256) as u8,
            };
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        if self.below(16) == 0 {
            image.truncate(self.below(image.len() as u64 + 1) as usize);
        }
    }
}

/// The machine's memory, as a vector that clones share.
#[derive(Clone)]
pub(crate) struct Phys(Rc<RefCell<Vec<u8>>>);

impl PhysMemory for Phys {
    fn read(&self, addr: HostPhysAddr, buf: &mut [u8]) {
        let at = addr.as_u64() as usize;
        buf.copy_from_slice(&self.0.borrow()[at..at + buf.len()]);
    }
    fn write(&self, addr: HostPhysAddr, data: &[u8]) {
        let at = addr.as_u64() as usize;
        self.0.borrow_mut()[at..at + data.len()].copy_from_slice(data);
    }
    fn read_u64(&self, addr: HostPhysAddr) -> u64 {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes);
        u64::from_le_bytes(bytes)
    }
    fn write_u64(&self, addr: HostPhysAddr, value: u64) {
        self.write(addr, &value.to_le_bytes());
    }
    fn zero(&self, addr: HostPhysAddr, bytes: u64) {
        let at = addr.as_u64() as usize;
        self.0.borrow_mut()[at..at + bytes as usize].fill(0);
    }
    fn compare_exchange(&self, addr: HostPhysAddr, size: u8, current: u64, new: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes[..usize::from(size)]);
        let old = u64::from_le_bytes(bytes);
        if old == current {
            self.write(addr, &new.to_le_bytes()[..usize::from(size)]);
        }
        old
    }
}

/// A handle to the machine's free frames.
#[derive(Clone)]
pub(crate) struct Frames(Rc<RefCell<FrameAllocator>>);

impl FrameSource for Frames {
    fn allocate(&mut self, size: PageSize) -> Option<HostPhysAddr> {
        self.0.borrow_mut().allocate(size)
    }
    fn free(&mut self, frame: HostPhysAddr, size: PageSize) {
        self.0.borrow_mut().free(frame, size);
    }
}

/// The core on which the VM runs. Its TSC ticks in nanoseconds, when a test says so.
pub(crate) struct Core {
    pub tsc: u64,
    /// How often interrupts of the machine are served before one wants the core.
    pub patience: usize,
    pub armed: Vec<u64>,
    pub output: Vec<u8>,
    /// vCPUs that were told to look.
    pub kicked: u64,
    /// How its queues were looked at.
    pub looks: Vec<Ask>,
    /// Frames are in them.
    pub frames: bool,
}

impl Host for Core {
    fn tsc(&self) -> u64 {
        self.tsc
    }
    fn kick(&mut self, vcpus: u64) -> bool {
        self.kicked |= vcpus;
        false
    }
    fn turn_end(&self) -> u64 {
        u64::MAX
    }
    fn arm(&mut self, deadline: u64) {
        self.armed.push(deadline);
    }
    fn interrupted(&mut self) -> bool {
        let wanted = self.patience == 0;
        self.patience = self.patience.saturating_sub(1);
        wanted
    }
    fn output(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }
    fn frames(&mut self, ask: Ask) -> bool {
        self.looks.push(ask);
        let found = core::mem::take(&mut self.frames);
        match ask {
            Ask::Now => false,
            Ask::Idle => found,
            Ask::Never => true,
        }
    }
    #[cfg(feature = "fault-injection")]
    fn with_shared_lock(&mut self, work: fn() -> !) -> ! {
        work()
    }
}

pub(crate) type TestCpu = Processor<MockVcpu, Phys, Frames>;

/// The TSC when VMs are made: their time zero.
pub(crate) const ORIGIN: u64 = 5_000_000;

/// A machine of 40 MiB with a bundle that holds the kernel `kernel`, which is one HLT, and
/// `text`, which is none.
pub(crate) struct Machine {
    pub phys: Phys,
    pub frames: Frames,
    pub total: u64,
    archive: Vec<u8>,
}

impl Machine {
    pub fn new() -> Self {
        Self::of(40 << 20)
    }

    pub fn of(bytes: usize) -> Self {
        let note = notes(KERNEL, true);
        let kernel = elf(
            true,
            0,
            KERNEL,
            &[(1, KERNEL, 0x1000, &[0xf4; 64]), (4, 0, 0, &note)],
        );
        let range = FrameRange {
            start: HostPhysAddr::new(0),
            end: HostPhysAddr::new(bytes as u64),
        };
        Self {
            phys: Phys(Rc::new(RefCell::new(vec![0; bytes]))),
            frames: Frames(Rc::new(RefCell::new(FrameAllocator::new(&[range])))),
            total: bytes as u64,
            archive: pack(&[("kernel", &kernel), ("text", b"not a kernel")]).unwrap(),
        }
    }

    pub fn free_bytes(&self) -> u64 {
        self.frames.0.borrow().free_bytes()
    }

    /// Makes a VM from the keys of its section.
    pub fn make(
        &self,
        keys: &str,
        make_vcpu: &mut dyn FnMut() -> Result<MockVcpu, String>,
    ) -> Result<Vec<TestCpu>, VmError> {
        let config = parse(keys);
        let mut making = self.begin(&config, &Bundle::open(&self.archive).unwrap())?;
        while !making.step()? {}
        let (vm, entry) = making.finish();
        (0..config.vcpus)
            .map(|id| Processor::new(&vm, id, &entry, &mut |_| make_vcpu()))
            .collect()
    }

    /// Begins to make a VM.
    pub fn begin<'i>(
        &self,
        config: &VmConfig,
        bundle: &Bundle<'i>,
    ) -> Result<Making<'i, Phys, Frames>, VmError> {
        Making::new(VmSetup {
            config,
            bundle,
            format: Format::Ept,
            phys: self.phys.clone(),
            frames: self.frames.clone(),
            free_bytes: self.free_bytes(),
            tsc: ORIGIN,
            tsc_hz: 1_000_000_000,
            wall_clock: 1_700_000_000_500_000_000,
            enabled: Enabled {
                xcr0: 7,
                ..Enabled::default()
            },
            host_cpuid: &cpuid,
            random_seed: [7; 32],
            apic_access_page: None,
            still_waiting: || {},
        })
    }
}

/// The kernel's entry point.
pub(crate) const KERNEL: u64 = 0x20_0000;

pub(crate) fn parse(keys: &str) -> VmConfig {
    const TEXT: &str = "[[vm]]\nname = \"t\"\nkernel = \"kernel\"\nkind = \"pvh\"\n\
        memory = \"16MiB\"\nlarge_pages = false\n\
        [vm.devices]\ndebug_exit = true\ndebug_console = true\n";
    // Keys that a test gives take the place of these.
    let mut lines: Vec<&str> = TEXT.lines().collect();
    for key in keys.lines() {
        let name = key.split('=').next().unwrap();
        match lines.iter().position(|line| line.starts_with(name)) {
            Some(at) => lines[at] = key,
            None => lines.insert(1, key),
        }
    }
    let mut config = config::parse(&lines.join("\n"), "test.toml").unwrap();
    config.vms.remove(0).unwrap()
}

/// A processor of Intel's with paging extensions and XSAVE up to AVX.
fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (0, _) => [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0008, _) => [0x3028, 0, 0, 0],
        (0xd, 0) => [7, 832, 832, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (4 | 0xd, _) => [0; 4],
        _ => [u32::MAX; 4],
    }
}

/// A VM with one vCPU and the core on which it runs.
pub(crate) struct World {
    pub cpu: TestCpu,
    pub core: Core,
    pub machine: Machine,
}

impl World {
    /// The VM stands at its first instruction, and its vCPU tells where instructions end: two
    /// bytes on.
    pub fn new() -> Self {
        let machine = Machine::new();
        let mut cpus = machine.make("", &mut || Ok(MockVcpu::protected())).unwrap();
        let mut cpu = cpus.remove(0);
        cpu.vcpu.next_rip = Some(KERNEL + 2);
        Self {
            cpu,
            core: Core {
                tsc: ORIGIN,
                patience: 0,
                armed: Vec::new(),
                output: Vec::new(),
                kicked: 0,
                looks: Vec::new(),
                frames: false,
            },
            machine,
        }
    }

    /// Runs with these exits, and then until something wants the core.
    pub fn run(&mut self, exits: &[Exit]) -> Stop {
        self.cpu.vcpu.delivered.clear();
        self.cpu.vcpu.exits = exits.iter().copied().collect();
        self.core.patience = exits.len();
        self.cpu.run(&mut self.core)
    }

    pub fn memory(&self) -> spin::MutexGuard<'_, memory::AddressSpace<Phys, Frames>> {
        self.cpu.vm().memory().unwrap()
    }
}
