//! The packed virtqueue (virtio 1.2 §2.8): one ring of descriptors that driver and device write in
//! turn, told apart by two bits of each descriptor's flags that change their meaning with each
//! round (the wrap counters).

use core::sync::atomic::{Ordering, fence};

use arch::{GuestMemory, GuestPhysAddr};
use serde::{Deserialize, Serialize};

use crate::chain::{
    Chain, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, QueueError, Token, at, indirect_count,
    read, ring,
};
use crate::features;
use crate::queue::{MAX_SIZE, Position, QueueLayout};

const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;

/// Event suppression flags (§2.8.10): all, none, or at one place of the ring.
const EVENTS_ON: u16 = 0;
const EVENTS_OFF: u16 = 1;
const EVENTS_AT: u16 = 2;

/// A place in the ring, and the wrap counter with which it is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cursor {
    place: u16,
    wrap: bool,
}

impl Cursor {
    const START: Self = Self {
        place: 0,
        wrap: true,
    };

    /// `places`, at most `size`, further on.
    const fn advance(self, places: u16, size: u16) -> Self {
        let place = self.place as u32 + places as u32;
        if place >= size as u32 {
            Self {
                place: (place - size as u32) as u16,
                wrap: !self.wrap,
            }
        } else {
            Self {
                place: place as u16,
                wrap: self.wrap,
            }
        }
    }
}

/// A packed virtqueue, as the driver set it up and as far as the device has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedQueue {
    layout: QueueLayout,
    indirect: bool,
    event_index: bool,
    available: Cursor,
    used: Cursor,
    /// The first descriptor of those staged, and the flags that will show it.
    staged: Option<(u16, u16)>,
    /// Places given back since the driver was last interrupted, or might have been.
    unsignalled: u32,
}

impl PackedQueue {
    pub(crate) fn new(layout: QueueLayout, negotiated: u64) -> Result<Self, QueueError> {
        if layout.size == 0 || layout.size > MAX_SIZE {
            return Err(QueueError::Size(layout.size));
        }
        for (addr, align) in [
            (layout.descriptors, 16),
            (layout.driver, 4),
            (layout.device, 4),
        ] {
            if !addr.is_aligned(align) {
                return Err(QueueError::Ring(addr));
            }
        }
        Ok(Self {
            layout,
            indirect: negotiated & features::RING_INDIRECT_DESC != 0,
            event_index: negotiated & features::RING_EVENT_IDX != 0,
            available: Cursor::START,
            used: Cursor::START,
            staged: None,
            unsignalled: 0,
        })
    }

    fn descriptor(&self, place: u16) -> Result<GuestPhysAddr, QueueError> {
        at(self.layout.descriptors, 16 * u64::from(place))
    }

    /// The flags of the next descriptor, if it is available.
    pub(crate) fn waiting(&self, mem: &mut dyn GuestMemory) -> Result<Option<u16>, QueueError> {
        let Cursor { place, wrap } = self.available;
        let flags = u16::from_le_bytes(read(mem, at(self.descriptor(place)?, 14)?)?);
        let available = (flags & DESC_AVAIL != 0) == wrap && (flags & DESC_USED != 0) != wrap;
        Ok(available.then_some(flags))
    }

    pub(crate) fn pop(
        &mut self,
        mem: &mut dyn GuestMemory,
        chain: &mut Chain,
    ) -> Result<bool, QueueError> {
        let size = self.layout.size;
        let mut cursor = self.available;
        let Some(flags) = self.waiting(mem)? else {
            return Ok(false);
        };
        // The rest is read after the flags that tell of it (§2.8.21.1).
        fence(Ordering::Acquire);
        chain.clear();
        let mut places = 0;
        // The flags of the first descriptor are the ones that were looked at; of the others the
        // AVAIL and USED bits say nothing more: the first was made available last.
        let mut flags = Some(flags);
        loop {
            let found = Descriptor::read(mem, self.descriptor(cursor.place)?)?;
            let flags = flags.take().unwrap_or(found.fourth);
            cursor = cursor.advance(1, size);
            places += 1;
            // The last descriptor has the buffer id (§2.8.6).
            chain.token.id = found.third;
            if flags & DESC_INDIRECT != 0 {
                if !self.indirect || places > 1 || flags & DESC_NEXT != 0 {
                    return Err(QueueError::Indirect(found.length));
                }
                Self::table(mem, GuestPhysAddr::new(found.addr), found.length, chain)?;
                break;
            }
            chain.append(found.addr, found.length, flags)?;
            if flags & DESC_NEXT == 0 {
                break;
            }
            if places >= size {
                return Err(QueueError::Chain);
            }
        }
        chain.token.places = places;
        self.available = cursor;
        Ok(true)
    }

    /// An indirect table: all of its descriptors in their order; only WRITE means anything
    /// (§2.8.7).
    fn table(
        mem: &mut dyn GuestMemory,
        table: GuestPhysAddr,
        bytes: u32,
        chain: &mut Chain,
    ) -> Result<(), QueueError> {
        for number in 0..indirect_count(bytes)? {
            let found = Descriptor::read(mem, at(table, 16 * u64::from(number))?)?;
            if found.fourth & DESC_INDIRECT != 0 {
                return Err(QueueError::Indirect(found.length));
            }
            chain.append(found.addr, found.length, found.fourth)?;
        }
        Ok(())
    }

    pub(crate) const fn position(&self) -> Position {
        Position {
            next: self.available.place,
            wrap: self.available.wrap,
        }
    }

    pub(crate) const fn rewind(&mut self, position: Position) {
        self.available = Cursor {
            place: position.next,
            wrap: position.wrap,
        };
    }

    pub(crate) fn stage(
        &mut self,
        mem: &mut dyn GuestMemory,
        token: Token,
        written: u32,
    ) -> Result<(), QueueError> {
        let slot = self.descriptor(self.used.place)?;
        let body = u64::from(token.id) << 32 | u64::from(written);
        let [a, b, c, d, e, f, _, _] = body.to_le_bytes();
        mem.write(at(slot, 8)?, &[a, b, c, d, e, f]).map_err(ring)?;
        // WRITE says that `written` means something (§2.8.4).
        let mut flags = u16::from(written != 0) * DESC_WRITE;
        if self.used.wrap {
            flags |= DESC_AVAIL | DESC_USED;
        }
        if self.staged.is_none() {
            self.staged = Some((self.used.place, flags));
        } else {
            fence(Ordering::Release);
            mem.write(at(slot, 14)?, &flags.to_le_bytes())
                .map_err(ring)?;
        }
        self.used = self.used.advance(token.places, self.layout.size);
        self.unsignalled = self.unsignalled.saturating_add(token.places.into());
        Ok(())
    }

    pub(crate) fn publish(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        let Some((place, flags)) = self.staged.take() else {
            return Ok(());
        };
        // The flags of the first after everything else: the driver takes used descriptors in
        // their order.
        fence(Ordering::Release);
        mem.write(at(self.descriptor(place)?, 14)?, &flags.to_le_bytes())
            .map_err(ring)
    }

    pub(crate) fn wants_interrupt(
        &mut self,
        mem: &mut dyn GuestMemory,
    ) -> Result<bool, QueueError> {
        let places = core::mem::take(&mut self.unsignalled);
        if places == 0 {
            return Ok(false);
        }
        // As in the split ring: published before the wish is read.
        fence(Ordering::SeqCst);
        let [a, b, c, d] = read(mem, self.layout.driver)?;
        let (wanted, flags) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]) & 3);
        if flags != EVENTS_AT || !self.event_index {
            return Ok(flags != EVENTS_OFF);
        }
        // How far behind the end of what was used the wanted place lies, in this round or the
        // one before.
        let (place, size) = (u32::from(wanted & 0x7fff), u32::from(self.layout.size));
        let end = u32::from(self.used.place);
        let end = if (wanted >> 15 != 0) == self.used.wrap {
            end
        } else {
            end + size
        };
        Ok(end
            .checked_sub(place)
            .is_some_and(|back| (1..=places).contains(&back)))
    }

    pub(crate) fn ask_for_notification(
        &mut self,
        mem: &mut dyn GuestMemory,
        on: bool,
    ) -> Result<(), QueueError> {
        let events = self.layout.device;
        let flags = match (self.event_index, on) {
            (true, true) => {
                let next = self.available.place | u16::from(self.available.wrap) << 15;
                mem.write(events, &next.to_le_bytes()).map_err(ring)?;
                fence(Ordering::Release);
                EVENTS_AT
            }
            (false, true) => EVENTS_ON,
            (_, false) => EVENTS_OFF,
        };
        mem.write(at(events, 2)?, &flags.to_le_bytes())
            .map_err(ring)?;
        // The next look at the ring comes after the driver can see this.
        fence(Ordering::SeqCst);
        Ok(())
    }
}
