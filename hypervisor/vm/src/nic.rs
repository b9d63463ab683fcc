//! A VM's network cards, as the machine reaches them.
//!
//! The guest reaches a card through its PCI function, with the board locked. Frames go another
//! way: whoever moves them locks the guest's memory and the card, and nothing of a second VM. The
//! order is board → memory → card.

use crate::config::network;
use crate::vm::Vm;
use alloc::boxed::Box;
use alloc::vec::Vec;
use arch::{FrameSource, GuestMemory, PhysMemory};
use machine::board::Board;
use machine::map;
use machine::pci::DeviceFunction;
use virtio::net::{NetConfig, NetDevice, SharedNet};
use virtio::pci::VirtioPci;
use vswitch::PortId;

/// A card, and where it is plugged in.
pub struct VmNic {
    /// The number of the switch.
    pub switch: usize,
    /// Its port there.
    pub port: PortId,
    /// What can be asked of it without a lock.
    pub net: SharedNet,
}

/// Plugs the cards in; `None` if they do not fit.
pub(crate) fn plug(board: &mut Board, nics: &[network::Nic]) -> Option<Vec<VmNic>> {
    let mut plugged = Vec::new();
    for (device, nic) in (map::FIRST_NET_DEVICE..).zip(nics) {
        let mut config = NetConfig::new(nic.mac.0);
        config.pairs = nic.queues;
        config.mtu = nic.mtu.unwrap_or(config.mtu);
        config.mac_change = nic.port.mac_change;
        let net = SharedNet::new(NetDevice::new(config).ok()?);
        let function = Box::new(VirtioPci::new(net.clone())?);
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

    /// Whether a doorbell for frames was rung.
    #[inline]
    pub(crate) fn has_frames(&self) -> bool {
        self.nics.iter().any(|nic| nic.net.has_notified())
    }

    /// Works on card `index` and the guest's memory, both locked; `None` if there is no such card
    /// or the VM is given up. No other VM's locks may be held.
    pub fn with_nic<T>(
        &self,
        index: usize,
        work: impl FnOnce(&mut NetDevice, &mut dyn GuestMemory) -> T,
    ) -> Option<T> {
        let nic = self.nics.get(index)?;
        let mut memory = self.memory().ok()?;
        let mut net = self.lock(nic.net.device()).ok()?;
        Some(work(&mut net, &mut *memory))
    }
}
