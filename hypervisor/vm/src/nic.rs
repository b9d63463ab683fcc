//! A VM's network cards, as the machine reaches them.
//!
//! The guest reaches a card through its PCI function, with the board locked. Frames go another
//! way: whoever moves them locks the card and the guest's memory, and nothing of a second VM. The
//! order is board → card → memory.

use crate::config::network;
use crate::vm::Vm;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use arch::{FrameSource, GuestMemory, Nanos, PhysMemory};
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use machine::board::Board;
use machine::map;
use machine::pci::DeviceFunction;
use spin::Mutex;
use virtio::net::{NetConfig, NetDevice, SharedNet};
use virtio::pci::VirtioPci;
use virtio::{Device, Queue, Signals};
use vswitch::PortId;

/// A card, and where it is plugged in.
pub struct VmNic {
    /// The number of the switch.
    pub switch: usize,
    /// Its port there.
    pub port: PortId,
    pub(crate) net: Arc<Mutex<NetDevice>>,
}

/// The guest's side of a card: as [`SharedNet`], and says so when a doorbell was rung for frames.
struct Rings {
    net: SharedNet,
    rung: Arc<AtomicBool>,
}

impl Device for Rings {
    fn kind(&self) -> u16 {
        self.net.kind()
    }
    fn class(&self) -> u32 {
        self.net.class()
    }
    fn features(&self) -> u64 {
        self.net.features()
    }
    fn accepts(&self, features: u64) -> bool {
        self.net.accepts(features)
    }
    fn queues(&self) -> u16 {
        self.net.queues()
    }
    fn queue_size(&self, index: u16) -> u16 {
        self.net.queue_size(index)
    }
    fn config_size(&self) -> u32 {
        self.net.config_size()
    }
    fn read_config(&mut self, offset: u32, buf: &mut [u8]) {
        self.net.read_config(offset, buf);
    }
    fn start(&mut self, features: u64) {
        self.net.start(features);
    }
    fn attach(&mut self, index: u16, queue: Queue) {
        self.net.attach(index, queue);
        self.rung.store(true, Relaxed);
    }
    fn detach(&mut self, index: u16) {
        self.net.detach(index);
    }
    fn reset(&mut self) {
        self.net.reset();
    }
    fn notify(&mut self, index: u16) {
        self.net.notify(index);
        self.rung.store(true, Relaxed);
    }
    fn wants_service(&self) -> bool {
        self.net.wants_service()
    }
    fn serve(&mut self, mem: &mut dyn GuestMemory, now: Nanos) {
        self.net.serve(mem, now);
    }
    fn take_signals(&mut self) -> Signals {
        self.net.take_signals()
    }
}

/// Plugs the cards in; `rung` tells of doorbells for frames.
pub(crate) fn plug(
    board: &mut Board,
    nics: &[network::Nic],
    rung: &Arc<AtomicBool>,
) -> Option<Vec<VmNic>> {
    let mut plugged = Vec::new();
    for (device, nic) in (map::FIRST_NET_DEVICE..).zip(nics) {
        let mut config = NetConfig::new(nic.mac.0);
        config.pairs = nic.queues;
        config.mtu = nic.mtu.unwrap_or(config.mtu);
        let net = Arc::new(Mutex::new(NetDevice::new(config).ok()?));
        let rings = Rings {
            net: SharedNet(net.clone()),
            rung: rung.clone(),
        };
        let function = Box::new(VirtioPci::new(rings)?);
        board
            .pci
            .plug(DeviceFunction::new(device, 0)?, function)
            .ok()?;
        plugged.push(VmNic {
            switch: nic.switch,
            port: nic.port.id,
            net,
        });
    }
    Some(plugged)
}

impl<P: PhysMemory, F: FrameSource> Vm<P, F> {
    /// Its network cards, in the order of the configuration.
    #[must_use]
    pub fn nics(&self) -> &[VmNic] {
        &self.nics
    }

    /// Whether a doorbell for frames was rung since the last call.
    #[inline(always)]
    pub(crate) fn take_rung(&self) -> bool {
        self.rung.load(Relaxed) && self.rung.swap(false, Relaxed)
    }

    /// A doorbell was rung and not answered yet: the next entry of a vCPU does.
    pub fn ring_again(&self) {
        self.rung.store(true, Relaxed);
    }

    /// Works on card `index` and the guest's memory, both locked; `None` if there is no such card
    /// or the VM is given up. No other VM's locks may be held.
    pub fn with_nic<T>(
        &self,
        index: usize,
        work: impl FnOnce(&mut NetDevice, &mut dyn GuestMemory) -> T,
    ) -> Option<T> {
        let nic = self.nics.get(index)?;
        let mut net = self.lock(&nic.net).ok()?;
        let mut memory = self.memory().ok()?;
        Some(work(&mut net, &mut *memory))
    }

    /// Passes on what the cards have to tell their drivers: interrupts. Whom they are for is told
    /// by [`Vm::take_kicks`].
    pub fn tell_drivers(&self) {
        self.with_board(Board::carry_pci);
    }
}
