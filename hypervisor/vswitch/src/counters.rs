//! What ports count: frames and bytes each way, and every frame that went nowhere by its cause.

/// Why a frame, or a copy of it, is not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropCause {
    /// A flow says so, or no flow says otherwise.
    Flow,
    /// More steps than [`MAX_STEPS`](crate::translate::MAX_STEPS).
    TooManySteps,
    /// It came in by, or is to leave by, a port that is not there.
    NoPort,
    /// The link of the port is down.
    LinkDown,
    /// It ends inside its Ethernet header.
    Short,
    /// It is longer than [`MAX_FRAME`](crate::MAX_FRAME).
    Long,
    /// It came in by a port that only sends copies.
    MirrorPort,
    /// Its 802.1Q tag is cut off.
    PartialTag,
    /// VLAN 4095 (R9).
    Vlan4095,
    /// The port is not in that VLAN.
    Vlan,
    /// It has two tags and would need a third.
    Tags,
    /// The destination is not relayed by bridges (R2).
    Reserved,
    /// A bridge protocol's frame from a guest (R7).
    Bpdu,
    /// A guest sends with an address that is not its own (R7).
    ForgedSource,
    /// A guest answers as a DHCP server (R7).
    DhcpServer,
    /// A guest advertises itself as a router (R7).
    RouterAdvertisement,
    /// More broadcasts than the port may send (R7).
    Storm,
    /// From outside, with the address of a guest that is here (R5).
    Echo,
    /// Broadcast or multicast by an uplink that is not the active one (R4).
    PassiveUplink,
    /// By another uplink than the guest's (R6).
    ReversePath,
    /// A beacon, which is for the switch that sent it alone (R8).
    Beacon,
    /// From uplink to uplink (R1).
    UplinkToUplink,
    /// Between two protected ports.
    Protected,
    /// Nobody has that address (R3).
    Unknown,
    /// The destination is behind the port that it came from.
    SamePort,
    /// No other port is in the VLAN.
    NoOutput,
    /// More than the port may send.
    IngressRate,
    /// More than the port may receive.
    EgressRate,
    /// More than a meter lets pass.
    Meter,
    /// A flow counts the time to live down, and it is over.
    TimeToLive,
}

impl DropCause {
    /// How many there are.
    pub const COUNT: usize = Self::TimeToLive as usize + 1;

    /// Each, with the word for it.
    pub const ALL: [(Self, &'static str); Self::COUNT] = [
        (Self::Flow, "flow"),
        (Self::TooManySteps, "too-many-steps"),
        (Self::NoPort, "no-port"),
        (Self::LinkDown, "link-down"),
        (Self::Short, "short"),
        (Self::Long, "long"),
        (Self::MirrorPort, "mirror-port"),
        (Self::PartialTag, "partial-tag"),
        (Self::Vlan4095, "vlan-4095"),
        (Self::Vlan, "vlan"),
        (Self::Tags, "tags"),
        (Self::Reserved, "reserved"),
        (Self::Bpdu, "bpdu"),
        (Self::ForgedSource, "forged-source"),
        (Self::DhcpServer, "dhcp-server"),
        (Self::RouterAdvertisement, "router-advertisement"),
        (Self::Storm, "storm"),
        (Self::Echo, "echo"),
        (Self::PassiveUplink, "passive-uplink"),
        (Self::ReversePath, "reverse-path"),
        (Self::Beacon, "beacon"),
        (Self::UplinkToUplink, "uplink-to-uplink"),
        (Self::Protected, "protected"),
        (Self::Unknown, "unknown"),
        (Self::SamePort, "same-port"),
        (Self::NoOutput, "no-output"),
        (Self::IngressRate, "ingress-rate"),
        (Self::EgressRate, "egress-rate"),
        (Self::Meter, "meter"),
        (Self::TimeToLive, "time-to-live"),
    ];

    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::ALL.get(self as usize).map_or("", |(_, word)| word)
    }
}

/// What a port has seen. Every frame that came in is either in `forwarded` or in one of `drops`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Frames that came in by the port.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Those of them that left by a port at least.
    pub forwarded: u64,
    /// Those that did not, by [`DropCause`].
    drops: [u64; DropCause::COUNT],
    /// Frames that left by the port.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that were to leave by the port and were more than it may receive.
    pub tx_limited: u64,
    /// Addresses that were not learned because the port has its limit, or there was no room.
    pub not_learned: u64,
    /// Requests of the guest that its policy refused: another address, promiscuous mode.
    pub refused: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            rx_frames: 0,
            rx_bytes: 0,
            forwarded: 0,
            drops: [0; DropCause::COUNT],
            tx_frames: 0,
            tx_bytes: 0,
            tx_limited: 0,
            not_learned: 0,
            refused: 0,
        }
    }
}

impl Counters {
    /// Frames that came in by the port and went nowhere for that cause.
    #[must_use]
    pub fn dropped(&self, cause: DropCause) -> u64 {
        self.drops.get(cause as usize).copied().unwrap_or(0)
    }

    /// Frames that came in by the port and went nowhere.
    #[must_use]
    pub fn dropped_in_all(&self) -> u64 {
        self.drops.iter().sum()
    }

    pub(crate) fn drop(&mut self, cause: DropCause) {
        if let Some(count) = self.drops.get_mut(cause as usize) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_its_own_word_and_count() {
        let mut counters = Counters::default();
        for (place, (cause, word)) in DropCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, place);
            assert_eq!(cause.word(), word);
            let first = DropCause::ALL.iter().position(|(_, other)| *other == word);
            assert_eq!(first, Some(place));
            counters.drop(cause);
            assert_eq!(counters.dropped(cause), 1);
        }
        assert_eq!(counters.dropped_in_all(), DropCause::COUNT as u64);
    }
}
