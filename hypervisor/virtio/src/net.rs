//! The network device (virtio 1.2 §5.1; UDP segmentation as in 1.3 §5.1): one vNIC.
//!
//! A [`NetDevice`] is shared by the guest's PCI function ([`SharedNet`]), which negotiates and
//! serves the control queue, and by who moves frames: [`NetDevice::transmit`] takes frames out of a
//! transmit queue, [`NetDevice::receive`] puts one into a receive queue, [`NetDevice::settle`] shows
//! the driver a batch of them and asks once whether it wants an interrupt. Neither needs a second
//! device's lock: `transmit` leaves its frames in the caller's buffer.
//!
//! What a guest leaves to its card (checksums, segmentation) is passed on as it is if the receiver
//! negotiated that, and done on the way into its queue if not: see [`NetHeader::finish`].

mod bells;
mod control;
mod frame;
mod offload;

pub use control::MAX_ADDRESSES;
pub use frame::{ETHERNET, Frame, Whole};
pub use offload::{Checksum, Gso, GsoKind, HeaderError, NetHeader};

use alloc::{boxed::Box, sync::Arc, vec::Vec};

use arch::{GuestMemory, Nanos};
use serde::{Deserialize, Serialize};

use crate::chain::{Chain, QueueError, Token};
use crate::device::{Device, MAX_QUEUES, Signals};
use crate::queue::Queue;
use bells::{ASKED, BROKEN, Bells, CONFIG};
use control::{Settings, Unwanted};
use frame::flow_hash;
use offload::largest_packet;

/// Feature bits (§5.1.3).
pub mod feature {
    /// The device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver switches its offloads by the control queue.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The device says the largest MTU.
    pub const MTU: u64 = 1 << 3;
    /// The device has an address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP in IPv4 unsegmented.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TCP in IPv6 unsegmented.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes unsegmented TCP with CWR.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device segments TCP in IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device segments TCP in IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device segments TCP with CWR.
    pub const HOST_ECN: u64 = 1 << 13;
    /// The driver takes a frame in several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The device says whether its link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// Receive modes and address tables.
    pub const CTRL_RX: u64 = 1 << 18;
    /// VLAN filter.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// More receive modes.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// The driver announces itself when asked.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The driver changes its address by the control queue.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// The driver takes UDP in IPv4 unsegmented.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver takes UDP in IPv6 unsegmented.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device segments UDP.
    pub const HOST_USO: u64 = 1 << 56;
    /// The device says its speed.
    pub const SPEED_DUPLEX: u64 = 1 << 63;

    /// What the driver can switch.
    pub const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
    /// What a device offers; MQ only with a second pair of queues.
    pub const ALL: u64 = CSUM
        | CTRL_GUEST_OFFLOADS
        | MTU
        | MAC
        | GUEST_OFFLOADS
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS
        | CTRL_VQ
        | CTRL_RX
        | CTRL_VLAN
        | CTRL_RX_EXTRA
        | GUEST_ANNOUNCE
        | MQ
        | CTRL_MAC_ADDR
        | HOST_USO
        | SPEED_DUPLEX;
    /// A feature, and those of which it needs one (§5.1.3.1); each behind what it needs.
    pub(super) const NEEDS: [(u64, u64); 14] = [
        (GUEST_TSO4, GUEST_CSUM),
        (GUEST_TSO6, GUEST_CSUM),
        (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
        (GUEST_USO4, GUEST_CSUM),
        (GUEST_USO6, GUEST_CSUM),
        (HOST_TSO4, CSUM),
        (HOST_TSO6, CSUM),
        (HOST_ECN, HOST_TSO4 | HOST_TSO6),
        (HOST_USO, CSUM),
        (CTRL_RX, CTRL_VQ),
        (CTRL_VLAN, CTRL_VQ),
        (GUEST_ANNOUNCE, CTRL_VQ),
        (MQ, CTRL_VQ),
        (CTRL_MAC_ADDR, CTRL_VQ),
    ];
}

/// The most pairs of queues.
pub const MAX_PAIRS: u16 = 30;
const _: () = assert!(2 * MAX_PAIRS < MAX_QUEUES && bit(2 * MAX_PAIRS) < BROKEN);
/// The longest frame: an IPv6 packet with all of its payload, and two tags.
pub const MAX_FRAME: usize = ETHERNET + 8 + 40 + 65535;
/// Room that [`NetDevice::transmit`] needs in its buffer for a frame.
pub const FRAME_ROOM: usize = NetHeader::SIZE + MAX_FRAME;

/// Chains of one frame in mergeable buffers: 512 bytes each suffice for the longest.
const MAX_BUFFERS: usize = 130;
/// The longest frame that is written with its header in one go.
const SMALL: usize = 116;
/// Flows that are remembered for steering.
const FLOWS: usize = 256;
const QUEUE_SIZE: u16 = 1024;
const CONTROL_SIZE: u16 = 64;
/// Commands done in one go.
const COMMANDS: usize = 16;
const NETWORK_CARD: u16 = 1;
const ETHERNET_CONTROLLER: u32 = 0x02_0000;
const FULL_DUPLEX: u8 = 1;
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
/// struct virtio_net_config up to `duplex`.
const CONFIG_SIZE: u32 = 17;
/// Where num_buffers is in the header.
const NUM_BUFFERS: u64 = 10;

/// What a device is made as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet, 68 to 65535; frames have an Ethernet header in addition.
    pub mtu: u16,
    /// Pairs of queues, 1 to [`MAX_PAIRS`].
    pub pairs: u16,
    /// Mbit/s; `u32::MAX` is unknown.
    pub speed: u32,
    /// What it offers of [`feature::ALL`].
    pub offer: u64,
    /// The driver may give itself another address.
    pub mac_change: bool,
}

impl NetConfig {
    /// A device with this address and everything else usual.
    #[must_use]
    pub const fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            mtu: 1500,
            pairs: 1,
            speed: 10_000,
            offer: feature::ALL,
            mac_change: true,
        }
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// What is out of them.
    pub fn check(&self) -> Result<(), NetConfigError> {
        if self.mtu < 68 {
            Err(NetConfigError::Mtu(self.mtu))
        } else if !(1..=MAX_PAIRS).contains(&self.pairs) {
            Err(NetConfigError::Pairs(self.pairs))
        } else if self.mac[0] & 1 != 0 || self.mac == [0; 6] {
            Err(NetConfigError::Mac)
        } else {
            Ok(())
        }
    }
}

/// A configuration out of bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetConfigError {
    /// The MTU.
    #[error("an MTU of {0} is less than 68")]
    Mtu(u16),
    /// The pairs of queues.
    #[error("{0} pairs of queues are not 1 to {MAX_PAIRS}")]
    Pairs(u16),
    /// The address.
    #[error("the address is a group's or zero")]
    Mac,
}

/// What the driver asked for that is for the switch to grant as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// This address for itself; of several the last.
    pub mac: Option<[u8; 6]>,
    /// Unicasts that are not for it, or no longer any.
    pub promiscuous: Option<bool>,
}

/// Why a frame did not leave the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransmitDrop {
    /// The link is down.
    LinkDown,
    /// It lacks a virtio header or an Ethernet header.
    Short,
    /// It is longer than the MTU or the longest frame.
    Long,
    /// It asks for an offload that was not negotiated.
    NotNegotiated,
    /// Its checksum is said to be where none is.
    Checksum,
    /// It cannot be segmented as is said.
    Segmentation,
}

impl TransmitDrop {
    /// Each, with the word for it.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::LinkDown, "link-down"),
        (Self::Short, "short"),
        (Self::Long, "long"),
        (Self::NotNegotiated, "not-negotiated"),
        (Self::Checksum, "checksum"),
        (Self::Segmentation, "segmentation"),
    ];
}

impl From<HeaderError> for TransmitDrop {
    fn from(error: HeaderError) -> Self {
        match error {
            HeaderError::NotNegotiated => Self::NotNegotiated,
            HeaderError::Checksum => Self::Checksum,
            HeaderError::Segmentation => Self::Segmentation,
        }
    }
}

/// Why a frame did not reach the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveDrop {
    /// The driver is not ready, or broke the rules.
    #[error("the driver is not ready")]
    NotReady,
    /// The link is down.
    #[error("the link is down")]
    LinkDown,
    /// The driver does not want this destination.
    #[error("the driver filters this destination")]
    Address,
    /// The driver does not want this VLAN.
    #[error("the driver filters this VLAN")]
    Vlan,
    /// It is longer than the MTU or the driver's buffer.
    #[error("the frame is too long")]
    Long,
    /// It is no frame, or not what its header says.
    #[error("the frame is malformed")]
    Malformed,
    /// The driver has no buffer left.
    #[error("the driver has no buffer")]
    NoBuffer,
}

impl ReceiveDrop {
    /// Each, with the word for it.
    pub const ALL: [(Self, &'static str); 7] = [
        (Self::NotReady, "not-ready"),
        (Self::LinkDown, "link-down"),
        (Self::Address, "address"),
        (Self::Vlan, "vlan"),
        (Self::Long, "long"),
        (Self::Malformed, "malformed"),
        (Self::NoBuffer, "no-buffer"),
    ];
}

/// Frames and bytes that passed, and frames that did not, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames from the guest.
    pub out_frames: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Frames into the guest, segments one by one.
    pub in_frames: u64,
    /// Their bytes.
    pub in_bytes: u64,
    out_drops: [u64; 6],
    in_drops: [u64; 7],
}

impl Counters {
    /// Frames from the guest that were dropped for this reason.
    #[must_use]
    pub fn out_dropped(&self, cause: TransmitDrop) -> u64 {
        self.out_drops.get(cause as usize).copied().unwrap_or(0)
    }

    /// Frames to the guest that were dropped for this reason.
    #[must_use]
    pub fn in_dropped(&self, cause: ReceiveDrop) -> u64 {
        self.in_drops.get(cause as usize).copied().unwrap_or(0)
    }

    fn drop_out(&mut self, cause: TransmitDrop) {
        if let Some(count) = self.out_drops.get_mut(cause as usize) {
            *count += 1;
        }
    }

    fn drop_in(&mut self, cause: ReceiveDrop) {
        if let Some(count) = self.in_drops.get_mut(cause as usize) {
            *count += 1;
        }
    }
}

/// When the driver of a transmit queue that is found empty is asked to notify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// At once.
    Now,
    /// If the queue was empty from the start: not a driver that keeps sending.
    Idle,
    /// Not at all: nobody can add anything before the next call.
    Never,
}

/// What [`NetDevice::transmit`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transmitted {
    /// Chains taken, with those whose frames were dropped.
    pub chains: u32,
    /// There may be more, and the driver will not notify: call again.
    pub more: bool,
    /// There was nothing more, but the driver will not notify: call again in a while.
    pub silent: bool,
}

/// All that changes of a device, for saving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    settings: Settings,
    started: bool,
    /// It may reach memory.
    master: bool,
    /// The driver broke the rules.
    broken: bool,
    link: bool,
    queues: Vec<Option<Queue>>,
    /// A bit for each queue with news.
    notified: u64,
    /// A bit for each receive queue that was put into since [`NetDevice::settle`].
    unsettled: u64,
    /// See [`Bells`].
    signals: u64,
    counters: Counters,
}

/// A network device.
pub struct NetDevice {
    config: NetConfig,
    /// All but what is in `bells`.
    state: NetState,
    bells: Arc<Bells>,
    /// Why the device broke.
    fault: Option<QueueError>,
    /// By flow: the pair of queues on which the guest sent last.
    flows: [u8; FLOWS],
    /// Chains being worked on, here to keep them off the stack.
    chain: Box<Chain>,
    next: Box<Chain>,
}

const fn rx(pair: u16) -> u16 {
    2 * pair
}

const fn tx(pair: u16) -> u16 {
    2 * pair + 1
}

/// The bit of queue `index`; none beyond the last.
const fn bit(index: u16) -> u64 {
    match 1u64.checked_shl(index as u32) {
        Some(bit) => bit,
        None => 0,
    }
}

fn queue(queues: &mut [Option<Queue>], index: u16) -> Option<&mut Queue> {
    queues.get_mut(usize::from(index))?.as_mut()
}

impl NetDevice {
    /// A device, its link up.
    ///
    /// # Errors
    /// The configuration is out of bounds.
    pub fn new(config: NetConfig) -> Result<Self, NetConfigError> {
        config.check()?;
        let queues = usize::from(2 * config.pairs + 1);
        Ok(Self {
            config,
            state: NetState {
                settings: Settings::new(0, config.mac),
                started: false,
                master: true,
                broken: false,
                link: true,
                queues: (0..queues).map(|_| None).collect(),
                notified: 0,
                unsettled: 0,
                signals: 0,
                counters: Counters::default(),
            },
            bells: Arc::default(),
            fault: None,
            flows: [u8::MAX; FLOWS],
            chain: Box::default(),
            next: Box::default(),
        })
    }

    /// All state, for saving.
    #[must_use]
    pub fn save(&self) -> NetState {
        NetState {
            // Who looks after silent queues stays behind.
            notified: self.bells.notified() | self.bells.silent(),
            signals: self.bells.signals(),
            ..self.state.clone()
        }
    }

    /// Puts saved state of a device with the same configuration in place.
    pub fn restore(&mut self, mut state: NetState) {
        state
            .queues
            .resize(usize::from(2 * self.config.pairs + 1), None);
        state.settings.pairs = state.settings.pairs.clamp(1, self.config.pairs);
        self.bells.set(state.notified, state.signals);
        self.state = NetState {
            notified: 0,
            signals: 0,
            ..state
        };
        self.flows = [u8::MAX; FLOWS];
        self.update_served();
    }

    /// How it was made.
    #[must_use]
    pub const fn config(&self) -> &NetConfig {
        &self.config
    }

    /// The address in force: the driver may have set another one.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.state.settings.mac.unwrap_or(self.config.mac)
    }

    /// What passed and what did not.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.state.counters
    }

    /// What the driver did wrong, if the device stands because of it.
    #[must_use]
    pub const fn fault(&self) -> Option<QueueError> {
        self.fault
    }

    /// Whether the link is up.
    #[must_use]
    pub const fn link(&self) -> bool {
        self.state.link
    }

    /// Plugs the cable in or out.
    pub fn set_link(&mut self, up: bool) {
        if self.state.link != up {
            self.state.link = up;
            self.config_changed(feature::STATUS);
        }
    }

    /// What the driver asked for since the last call; after a reset what it has then.
    pub fn take_asked(&mut self) -> Asked {
        Asked {
            mac: self.state.settings.asked.take(),
            promiscuous: self.state.settings.asked_all.take(),
        }
    }

    /// Asks the driver to announce its address, as after a migration (§5.1.6.5.4). Does nothing if
    /// it cannot.
    pub fn announce(&mut self) {
        if self.state.settings.has(feature::GUEST_ANNOUNCE) && self.state.link {
            self.state.settings.announce = true;
            self.config_changed(feature::GUEST_ANNOUNCE);
        }
    }

    fn config_changed(&mut self, feature: u64) {
        if self.state.started && self.state.settings.has(feature) {
            self.bells.signal(CONFIG);
        }
    }

    /// Whether a driver runs that kept to the rules so far, and lets the device reach memory.
    #[must_use]
    pub const fn ready(&self) -> bool {
        self.state.started && self.state.master && !self.state.broken
    }

    fn broken(&mut self, error: QueueError) {
        self.fault = Some(error);
        self.state.broken = true;
        self.bells.signal(BROKEN);
        self.update_served();
    }

    fn control_queue(&self) -> u16 {
        if self.state.settings.has(feature::MQ) {
            2 * self.config.pairs
        } else {
            2
        }
    }

    /// Takes up to `budget` chains out of the transmit queue of `pair`. The frames are copied into
    /// `buffer` one behind the other, as long as there are [`FRAME_ROOM`] bytes left in it, and
    /// handed to `sink` with what is to be done to them yet; they stay there when this returns, so
    /// that they can be delivered without this device's lock.
    ///
    /// While chains are there the driver need not notify. When there are none it is asked to, as
    /// `ask` says, and one more look is taken. In the end the driver is told, once.
    pub fn transmit<'b>(
        &mut self,
        mem: &mut dyn GuestMemory,
        pair: u16,
        budget: u32,
        ask: Ask,
        mut buffer: &'b mut [u8],
        mut sink: impl FnMut(NetHeader, Whole<'b>),
    ) -> Transmitted {
        let mut done = Transmitted::default();
        if !self.ready() || pair >= self.config.pairs {
            return done;
        }
        let Some(queue) = queue(&mut self.state.queues, tx(pair)) else {
            return done;
        };
        let (settings, counters) = (&self.state.settings, &mut self.state.counters);
        let chain = &mut *self.chain;
        let mut take_frames = || {
            queue.ask_for_notification(mem, false)?;
            loop {
                if done.chains >= budget || buffer.len() < FRAME_ROOM {
                    done.more = true;
                    return Ok(());
                }
                if !queue.pop(mem, chain)? {
                    if ask == Ask::Never || ask == Ask::Idle && done.chains > 0 {
                        done.silent = true;
                        return Ok(());
                    }
                    queue.ask_for_notification(mem, true)?;
                    if !queue.pop(mem, chain)? {
                        return Ok(());
                    }
                    queue.ask_for_notification(mem, false)?;
                }
                let found = match self.state.link {
                    true => read_frame(mem, chain, settings.features, self.config.mtu, buffer)?,
                    false => Err(TransmitDrop::LinkDown),
                };
                queue.stage(mem, chain.token(), 0)?;
                done.chains += 1;
                match found {
                    Ok((header, length)) => {
                        let (frame, rest) =
                            core::mem::take(&mut buffer).split_at_mut(NetHeader::SIZE + length);
                        buffer = rest;
                        // As a receiver has it that takes everything over.
                        if let Some(place) = frame.first_chunk_mut() {
                            *place = header.encode(u64::MAX, 1);
                        }
                        let frame = Whole::headed(frame);
                        counters.out_frames += 1;
                        counters.out_bytes += length as u64;
                        if settings.pairs > 1 {
                            // Answers come to the same pair (§5.1.6.5.6).
                            let flow = frame.frame().with_head(flow_hash) as usize % FLOWS;
                            if let Some(flow) = self.flows.get_mut(flow) {
                                *flow = pair as u8;
                            }
                        }
                        sink(header, frame);
                    }
                    Err(cause) => counters.drop_out(cause),
                }
            }
        };
        let taken = take_frames();
        // What was taken is given back in any case.
        let told = match done.chains {
            0 => Ok(false),
            _ => queue.publish(mem).and_then(|()| queue.wants_interrupt(mem)),
        };
        match taken.and(told) {
            Ok(true) => self.bells.signal(bit(tx(pair))),
            Ok(false) => {}
            Err(error) => {
                self.broken(error);
                (done.more, done.silent) = (false, false);
            }
        }
        done
    }

    /// Puts a frame into a receive queue, or several segments of it, after what the driver did not
    /// take over was done. [`NetDevice::settle`] shows them to the driver.
    ///
    /// # Errors
    /// Why it was dropped; it is counted. Of a segmented packet the first segments may have gone in.
    pub fn receive(
        &mut self,
        mem: &mut dyn GuestMemory,
        header: &NetHeader,
        frame: &Frame<'_>,
    ) -> Result<(), ReceiveDrop> {
        let outcome = self.deliver(mem, header, frame);
        if let Err(cause) = outcome {
            self.state.counters.drop_in(cause);
        }
        outcome
    }

    fn deliver(
        &mut self,
        mem: &mut dyn GuestMemory,
        header: &NetHeader,
        frame: &Frame<'_>,
    ) -> Result<(), ReceiveDrop> {
        if !self.ready() {
            return Err(ReceiveDrop::NotReady);
        }
        if !self.state.link {
            return Err(ReceiveDrop::LinkDown);
        }
        let pair = frame.with_head(|head| self.admit(header, head, frame.len()))?;
        let offloads = self.state.settings.offloads;
        header.finish(offloads, frame, |header, frame| {
            self.put(mem, pair, header, frame)
        })
    }

    /// Looks at the first bytes of a frame; gives the pair for it.
    fn admit(&self, header: &NetHeader, head: &[u8], length: usize) -> Result<u16, ReceiveDrop> {
        let packet = largest_packet(header, head, length).ok_or(ReceiveDrop::Malformed)?;
        let settings = &self.state.settings;
        settings.wants(head).map_err(|unwanted| match unwanted {
            Unwanted::Address => ReceiveDrop::Address,
            Unwanted::Vlan => ReceiveDrop::Vlan,
        })?;
        if packet > self.config.mtu.into() || length > MAX_FRAME {
            return Err(ReceiveDrop::Long);
        }
        let there =
            |&pair: &u16| matches!(self.state.queues.get(usize::from(rx(pair))), Some(Some(_)));
        let chosen = match settings.pairs {
            0 | 1 => 0,
            pairs => {
                let hash = flow_hash(head);
                match self.flows.get(hash as usize % FLOWS) {
                    Some(&pair) if u16::from(pair) < pairs => pair.into(),
                    _ => ((u64::from(hash) * u64::from(pairs)) >> 32) as u16,
                }
            }
        };
        // A queue that is being reset: any other (§5.1.6.5.6).
        Some(chosen)
            .filter(there)
            .or_else(|| (0..settings.pairs).find(there))
            .ok_or(ReceiveDrop::NotReady)
    }

    fn put(
        &mut self,
        mem: &mut dyn GuestMemory,
        pair: u16,
        header: &NetHeader,
        frame: &Frame<'_>,
    ) -> Result<(), ReceiveDrop> {
        let queue = queue(&mut self.state.queues, rx(pair)).ok_or(ReceiveDrop::NotReady)?;
        let settings = &self.state.settings;
        let position = queue.position();
        let bytes = header.encode(settings.offloads, 1);
        let merge = settings.has(feature::MRG_RXBUF);
        let chains = [&mut *self.chain, &mut *self.next];
        match write_frame(mem, queue, chains, bytes, frame, merge) {
            Ok(Ok(())) => {
                self.state.unsettled |= bit(rx(pair));
                self.state.counters.in_frames += 1;
                self.state.counters.in_bytes += frame.len() as u64;
                Ok(())
            }
            Ok(Err(cause)) => {
                queue.rewind(position);
                Err(cause)
            }
            Err(error) => {
                self.broken(error);
                Err(ReceiveDrop::NotReady)
            }
        }
    }

    /// Shows the driver what [`NetDevice::receive`] put into its queues, and finds out where it
    /// wants an interrupt: once after a batch of frames.
    pub fn settle(&mut self, mem: &mut dyn GuestMemory) {
        let unsettled = core::mem::take(&mut self.state.unsettled);
        for index in (0..self.config.pairs).map(rx) {
            if unsettled & bit(index) == 0 || !self.ready() {
                continue;
            }
            let Some(queue) = queue(&mut self.state.queues, index) else {
                continue;
            };
            match queue.publish(mem).and_then(|()| queue.wants_interrupt(mem)) {
                Ok(true) => self.bells.signal(bit(index)),
                Ok(false) => {}
                Err(error) => self.broken(error),
            }
        }
    }

    /// The queues that are served here: the control queue, and the receive queues, whose driver is
    /// told not to notify: a buffer is looked for when there is a frame.
    fn update_served(&self) {
        let receive = (0..self.config.pairs).map(|pair| bit(rx(pair)));
        let queues = receive.fold(bit(self.control_queue()), |set, queue| set | queue);
        self.bells.set_served(if self.ready() { queues } else { 0 });
    }

    fn serve_queues(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        let control = self.control_queue();
        if self.bells.take(bit(control)) != 0 {
            self.serve_control(mem, control)?;
        }
        for index in (0..self.config.pairs).map(rx) {
            if index != control
                && self.bells.take(bit(index)) != 0
                && let Some(queue) = queue(&mut self.state.queues, index)
            {
                queue.ask_for_notification(mem, false)?;
            }
        }
        Ok(())
    }

    fn serve_control(&mut self, mem: &mut dyn GuestMemory, index: u16) -> Result<(), QueueError> {
        let state = &mut self.state;
        let Some(queue) = queue(&mut state.queues, index) else {
            return Ok(());
        };
        for count in 0.. {
            if !queue.pop(mem, &mut self.chain)? {
                queue.ask_for_notification(mem, true)?;
                if !queue.pop(mem, &mut self.chain)? {
                    break;
                }
            }
            let settings = &mut state.settings;
            let before = settings.is_promiscuous();
            let (pairs, may_move) = (self.config.pairs, self.config.mac_change);
            let written = settings.command(mem, &self.chain, pairs, may_move)?;
            let after = settings.is_promiscuous();
            if after != before {
                settings.asked_all = Some(after);
            }
            if settings.asked.is_some() || after != before {
                self.bells.notify(ASKED);
            }
            queue.push(mem, self.chain.token(), written)?;
            if count >= COMMANDS {
                self.bells.notify(bit(index));
                break;
            }
        }
        if queue.wants_interrupt(mem)? {
            self.bells.signal(bit(index));
        }
        Ok(())
    }

    fn config_space(&self) -> [u8; CONFIG_SIZE as usize] {
        let [m0, m1, m2, m3, m4, m5] = self.mac();
        let announce = if self.state.settings.announce {
            ANNOUNCE
        } else {
            0
        };
        let link = if self.state.link { LINK_UP } else { 0 };
        let [s0, s1] = (link | announce).to_le_bytes();
        let [p0, p1] = self.config.pairs.to_le_bytes();
        let [u0, u1] = self.config.mtu.to_le_bytes();
        let [v0, v1, v2, v3] = self.config.speed.to_le_bytes();
        [
            m0,
            m1,
            m2,
            m3,
            m4,
            m5,
            s0,
            s1,
            p0,
            p1,
            u0,
            u1,
            v0,
            v1,
            v2,
            v3,
            FULL_DUPLEX,
        ]
    }
}

/// Reads a chain of a transmit queue into `buffer`; gives its header, checked, and the length of
/// the frame behind it.
fn read_frame(
    mem: &mut dyn GuestMemory,
    chain: &Chain,
    features: u64,
    mtu: u16,
    buffer: &mut [u8],
) -> Result<Result<(NetHeader, usize), TransmitDrop>, QueueError> {
    let all = usize::try_from(chain.readable_bytes()).unwrap_or(usize::MAX);
    let Some(bytes) = buffer.get_mut(..all).filter(|_| all <= FRAME_ROOM) else {
        return Ok(Err(TransmitDrop::Long));
    };
    chain.read(mem, 0, bytes)?;
    let Some((header, frame)) = bytes.split_first_chunk() else {
        return Ok(Err(TransmitDrop::Short));
    };
    let header = match NetHeader::check(*header, features, frame) {
        Ok(header) => header,
        Err(error) => return Ok(Err(error.into())),
    };
    Ok(match largest_packet(&header, frame, frame.len()) {
        None => Err(TransmitDrop::Short),
        Some(packet) if packet > mtu.into() => Err(TransmitDrop::Long),
        Some(_) => Ok((header, frame.len())),
    })
}

/// Writes a frame behind its header into the next chain of a receive queue, or with `merge` into as
/// many as it takes, and stages them. Nothing is given back if it does not work out.
fn write_frame(
    mem: &mut dyn GuestMemory,
    queue: &mut Queue,
    [first, next]: [&mut Chain; 2],
    header: [u8; NetHeader::SIZE],
    frame: &Frame<'_>,
    merge: bool,
) -> Result<Result<(), ReceiveDrop>, QueueError> {
    if !take_buffer(mem, queue, first)? {
        return Ok(Err(ReceiveDrop::NoBuffer));
    }
    let total = (NetHeader::SIZE + frame.len()) as u64;
    if first.writable_bytes() < total {
        return match merge {
            true => spread_frame(mem, queue, [first, next], header, frame),
            false => Ok(Err(ReceiveDrop::Long)),
        };
    }
    if let Some(headed) = frame.behind_header(&header) {
        first.write(mem, 0, headed)?;
    } else if let Some(small) = SmallFrame::join(&header, frame) {
        first.write(mem, 0, small.bytes())?;
    } else {
        let mut at = first.write(mem, 0, &header)?;
        for piece in frame.pieces() {
            at += first.write(mem, at as u64, piece)?;
        }
    }
    queue.stage(mem, first.token(), total as u32)?;
    Ok(Ok(()))
}

/// A header and a frame in one piece: to copy a short frame twice costs less than to reach guest
/// memory once more.
struct SmallFrame {
    bytes: [u8; NetHeader::SIZE + SMALL],
    length: usize,
}

impl SmallFrame {
    fn join(header: &[u8; NetHeader::SIZE], frame: &Frame<'_>) -> Option<Self> {
        if frame.len() > SMALL {
            return None;
        }
        let mut bytes = [0; NetHeader::SIZE + SMALL];
        let (to, mut rest) = bytes.split_first_chunk_mut()?;
        *to = *header;
        for piece in frame.pieces() {
            let (to, behind) = rest.split_at_mut_checked(piece.len())?;
            to.copy_from_slice(piece);
            rest = behind;
        }
        let length = NetHeader::SIZE + frame.len();
        Some(Self { bytes, length })
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Writes a frame into several chains, each but the last up to its end (§5.1.6.4.1). The first is
/// taken already, and needed to the end: only then it is known how many there are.
fn spread_frame(
    mem: &mut dyn GuestMemory,
    queue: &mut Queue,
    [first, next]: [&mut Chain; 2],
    header: [u8; NetHeader::SIZE],
    frame: &Frame<'_>,
) -> Result<Result<(), ReceiveDrop>, QueueError> {
    let mut full = [(Token::default(), 0); MAX_BUFFERS];
    let mut count = 0;
    let mut at = 0;
    for mut piece in core::iter::once(&header[..]).chain(frame.pieces()) {
        while !piece.is_empty() {
            let chain = if count == 0 { &mut *first } else { &mut *next };
            if at < chain.writable_bytes() {
                let written = chain.write(mem, at, piece)?;
                at += written as u64;
                piece = piece.get(written..).unwrap_or_default();
                continue;
            }
            let Some(slot) = full.get_mut(count) else {
                return Ok(Err(ReceiveDrop::Long));
            };
            *slot = (chain.token(), at as u32);
            (count, at) = (count + 1, 0);
            if !take_buffer(mem, queue, next)? {
                return Ok(Err(ReceiveDrop::NoBuffer));
            }
        }
    }
    let buffers = count as u16 + 1;
    first.write(mem, NUM_BUFFERS, &buffers.to_le_bytes())?;
    for &(token, written) in full.iter().take(count) {
        queue.stage(mem, token, written)?;
    }
    let last = if count == 0 { first } else { next };
    queue.stage(mem, last.token(), at as u32)?;
    Ok(Ok(()))
}

/// Takes a buffer to receive into. It must have room for a header (§5.1.6.3.1).
fn take_buffer(
    mem: &mut dyn GuestMemory,
    queue: &mut Queue,
    chain: &mut Chain,
) -> Result<bool, QueueError> {
    if !queue.pop(mem, chain)? {
        return Ok(false);
    }
    let (found, wanted) = (chain.writable_bytes(), NetHeader::SIZE as u64);
    if found < wanted {
        return Err(QueueError::Request { found, wanted });
    }
    Ok(true)
}

/// The device as its guest's PCI function and who moves its frames hold it.
#[derive(Clone)]
pub struct SharedNet {
    device: Arc<spin::Mutex<NetDevice>>,
    bells: Arc<Bells>,
    config: NetConfig,
}

impl SharedNet {
    /// Makes a device that can be shared.
    #[must_use]
    pub fn new(device: NetDevice) -> Self {
        Self {
            bells: Arc::clone(&device.bells),
            config: device.config,
            device: Arc::new(spin::Mutex::new(device)),
        }
    }

    /// The device's lock.
    #[must_use]
    pub const fn device(&self) -> &Arc<spin::Mutex<NetDevice>> {
        &self.device
    }

    /// The device.
    pub fn lock(&self) -> spin::MutexGuard<'_, NetDevice> {
        self.device.lock()
    }

    /// A bit for each pair whose transmit queue was notified since the last call, or was left
    /// silent. Takes no lock.
    pub fn take_notified(&self) -> u32 {
        let queues = (0..self.config.pairs).map(|pair| bit(tx(pair)));
        let found = self.bells.take(queues.fold(0, |set, queue| set | queue));
        let found = found | self.bells.take_silent();
        (0..self.config.pairs)
            .filter(|&pair| found & bit(tx(pair)) != 0)
            .fold(0, |set, pair| set | 1 << pair)
    }

    /// Whether [`SharedNet::take_notified`] or [`SharedNet::take_asked`] has something to give.
    /// Takes no lock.
    #[inline]
    #[must_use]
    pub fn has_notified(&self) -> bool {
        const TRANSMIT: u64 = 0xaaaa_aaaa_aaaa_aaaa;
        self.bells.notified() & TRANSMIT != 0
    }

    /// Whether since the last call there is something for [`NetDevice::take_asked`] to give. Takes
    /// no lock.
    pub fn take_asked(&self) -> bool {
        self.bells.take(ASKED) != 0
    }

    /// Marks the transmit queue of `pair` as notified: there is more in it than was taken.
    pub fn notify_again(&self, pair: u16) {
        self.bells.notify(bit(tx(pair)));
    }

    /// The driver of the transmit queue of `pair` was not asked to notify: the caller calls
    /// [`SharedNet::take_notified`] again before long, unless somebody else does first.
    pub fn leave_silent(&self, pair: u16) {
        self.bells.leave_silent(bit(tx(pair)));
    }

    /// Whether the driver is to hear of something: the guest's board has to look after its
    /// function. Takes no lock.
    #[must_use]
    pub fn has_signals(&self) -> bool {
        self.bells.signals() != 0
    }
}

impl Device for SharedNet {
    fn kind(&self) -> u16 {
        NETWORK_CARD
    }

    fn class(&self) -> u32 {
        ETHERNET_CONTROLLER
    }

    fn features(&self) -> u64 {
        let config = self.config;
        let one = if config.pairs > 1 { 0 } else { feature::MQ };
        // Nothing without what it needs (§2.2.2); what needs it in turn stands further down.
        feature::NEEDS.iter().fold(
            config.offer & feature::ALL & !one,
            |offer, &(feature, needs)| {
                if offer & needs == 0 {
                    offer & !feature
                } else {
                    offer
                }
            },
        )
    }

    fn accepts(&self, features: u64) -> bool {
        feature::NEEDS
            .iter()
            .all(|&(feature, needs)| features & feature == 0 || features & needs != 0)
    }

    fn queues(&self) -> u16 {
        2 * self.config.pairs + 1
    }

    fn queue_size(&self, index: u16) -> u16 {
        if index + 1 == self.queues() {
            CONTROL_SIZE
        } else {
            QUEUE_SIZE
        }
    }

    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }

    fn read_config(&mut self, offset: u32, buf: &mut [u8]) {
        let space = self.lock().config_space();
        let from = space.iter().skip(offset as usize);
        buf.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, features: u64) {
        let mut net = self.lock();
        let asked = (net.state.settings.asked, net.state.settings.asked_all);
        let settings = &mut net.state.settings;
        *settings = Settings::new(features, self.config.mac);
        (settings.asked, settings.asked_all) = asked;
        net.state.started = true;
        net.update_served();
    }

    fn attach(&mut self, index: u16, queue: Queue) {
        if let Some(slot) = self.lock().state.queues.get_mut(usize::from(index)) {
            *slot = Some(queue);
        }
        // Something may be there already.
        self.bells.notify(bit(index));
    }

    fn detach(&mut self, index: u16) {
        let state = &mut self.lock().state;
        if let Some(slot) = state.queues.get_mut(usize::from(index)) {
            *slot = None;
        }
        self.bells.forget(bit(index));
        state.unsettled &= !bit(index);
    }

    fn reset(&mut self) {
        let mut net = self.lock();
        let before = &net.state.settings;
        let own = self.config.mac;
        let news = before.is_promiscuous() || before.mac.is_some_and(|mac| mac != own);
        net.state.settings = Settings::new(0, own);
        net.state.settings.asked = news.then_some(own);
        net.state.settings.asked_all = news.then_some(false);
        (net.state.started, net.state.broken) = (false, false);
        net.state.queues.fill(None);
        net.state.unsettled = 0;
        net.fault = None;
        net.flows = [u8::MAX; FLOWS];
        net.update_served();
        self.bells.set(if news { ASKED } else { 0 }, 0);
    }

    fn set_master(&mut self, on: bool) {
        let mut net = self.lock();
        if net.state.master != on {
            net.state.master = on;
            net.update_served();
            // Doorbells in between were not heard.
            for (index, _) in (0..)
                .zip(&net.state.queues)
                .filter(|(_, queue)| on && queue.is_some())
            {
                self.bells.notify(bit(index));
            }
        }
    }

    fn notify(&mut self, index: u16) {
        self.bells.notify(bit(index));
    }

    fn wants_service(&self) -> bool {
        self.bells.wants_service()
    }

    fn serve(&mut self, mem: &mut dyn GuestMemory, _now: Nanos) {
        let mut net = self.lock();
        if net.ready()
            && let Err(error) = net.serve_queues(mem)
        {
            net.broken(error);
        }
    }

    fn take_signals(&mut self) -> Signals {
        self.bells.take_signals()
    }
}

#[cfg(test)]
mod tests;
