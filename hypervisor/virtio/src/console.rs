//! The console device (virtio 1.2 §5.3) with one port: what the driver writes is printed, what is
//! typed is put into the buffers it gave. The emergency register prints without any queue.

use alloc::boxed::Box;

use arch::{GuestMemory, Nanos};
use heapless::{Deque, Vec};

use crate::chain::{Chain, QueueError};
use crate::device::{Device, Signals};
use crate::queue::Queue;

/// Columns and rows are in the configuration space.
pub const F_SIZE: u64 = 1 << 0;
/// The emergency register works.
pub const F_EMERG_WRITE: u64 = 1 << 2;

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The offset of the emergency register (§5.3.4).
const EMERGENCY: u32 = 8;
const CONFIG_SIZE: u32 = 12;
/// Bytes that wait to be printed, and to be read, at most.
const OUTPUT: usize = 1024;
const INPUT: usize = 256;

#[derive(Debug, Default)]
struct Side {
    queue: Option<Queue>,
    /// There may be something new in it.
    notified: bool,
    /// The chain at work.
    chain: Box<Chain>,
}

impl Side {
    fn stop(&mut self) {
        (self.queue, self.notified) = (None, false);
    }
}

/// The device.
#[derive(Debug)]
pub struct Console {
    columns: u16,
    rows: u16,
    sides: [Side; 2],
    /// The chain that is being printed, and how far that has come.
    printing: Option<u64>,
    output: Vec<u8, OUTPUT>,
    input: Deque<u8, INPUT>,
    signals: Signals,
}

impl Console {
    /// A console of this many columns and rows.
    #[must_use]
    pub fn new(columns: u16, rows: u16) -> Self {
        Self {
            columns,
            rows,
            sides: [Side::default(), Side::default()],
            printing: None,
            output: Vec::new(),
            input: Deque::new(),
            signals: Signals::default(),
        }
    }

    /// The window in which the console is shown changed its size.
    pub const fn resize(&mut self, columns: u16, rows: u16) {
        (self.columns, self.rows) = (columns, rows);
        self.signals.config = true;
    }

    /// Takes what the driver printed, as far as there is room for it. `true`: there may be more.
    fn transmit(&mut self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        let Side { queue, chain, .. } = &mut self.sides[TRANSMIT];
        let Some(queue) = queue else {
            return Ok(false);
        };
        // As many chains as the queue holds: empty ones cost time, too.
        for _ in 0..QUEUE_SIZE {
            let offset = match self.printing {
                Some(offset) => offset,
                None if queue.pop(mem, chain)? => 0,
                None => {
                    queue.ask_for_notification(mem, true)?;
                    return queue.has_next(mem);
                }
            };
            let mut piece = [0; OUTPUT];
            let room = OUTPUT - self.output.len();
            let piece = piece.get_mut(..room).unwrap_or(&mut []);
            let length = chain.read(mem, offset, piece)?;
            let _ = self
                .output
                .extend_from_slice(piece.get(..length).unwrap_or(&[]));
            let offset = offset + length as u64;
            if offset < chain.readable_bytes() {
                self.printing = Some(offset);
                break;
            }
            self.printing = None;
            queue.push(mem, chain.token(), 0)?;
        }
        Ok(true)
    }

    /// Gives the driver what was typed. `true`: more could be given.
    fn receive(&mut self, mem: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        let Side { queue, chain, .. } = &mut self.sides[RECEIVE];
        let Some(queue) = queue else {
            return Ok(false);
        };
        while !self.input.is_empty() {
            if !queue.pop(mem, chain)? {
                queue.ask_for_notification(mem, true)?;
                return queue.has_next(mem);
            }
            let mut bytes = [0; INPUT];
            let typed = self.input.iter().zip(&mut bytes);
            let count = typed.map(|(&from, to)| *to = from).count();
            let written = chain.write(mem, 0, bytes.get(..count).unwrap_or(&[]))?;
            if written == 0 {
                return Err(QueueError::Request {
                    found: 0,
                    wanted: 1,
                });
            }
            for _ in 0..written {
                let _ = self.input.pop_front();
            }
            queue.push(mem, chain.token(), written as u32)?;
        }
        Ok(true)
    }

    fn exchange(&mut self, mem: &mut dyn GuestMemory) -> Result<(), QueueError> {
        if self.sides[TRANSMIT].notified {
            self.sides[TRANSMIT].notified = self.transmit(mem)?;
        }
        if self.sides[RECEIVE].notified && !self.input.is_empty() {
            self.sides[RECEIVE].notified = self.receive(mem)?;
        }
        for (side, bit) in self.sides.iter_mut().zip([1, 2]) {
            if let Some(queue) = &mut side.queue
                && queue.wants_interrupt(mem)?
            {
                self.signals.queues |= bit;
            }
        }
        Ok(())
    }
}

impl Device for Console {
    fn kind(&self) -> u16 {
        3
    }
    fn class(&self) -> u32 {
        0x07_8000
    }
    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }
    fn queues(&self) -> u16 {
        2
    }
    fn queue_size(&self, _index: u16) -> u16 {
        QUEUE_SIZE
    }
    fn config_size(&self) -> u32 {
        CONFIG_SIZE
    }
    fn read_config(&mut self, offset: u32, buf: &mut [u8]) {
        let (columns, rows) = (self.columns.to_le_bytes(), self.rows.to_le_bytes());
        // One port; the emergency register reads as nothing.
        let space = [columns[0], columns[1], rows[0], rows[1], 1, 0, 0, 0];
        for (byte, at) in buf.iter_mut().zip(offset as usize..) {
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // What does not fit is lost: nobody waits here.
        if offset == EMERGENCY
            && let Some(&byte) = data.first()
        {
            let _ = self.output.push(byte);
        }
    }
    fn start(&mut self, _features: u64) {}
    fn attach(&mut self, index: u16, queue: Queue) {
        if let Some(side) = self.sides.get_mut(usize::from(index)) {
            (side.queue, side.notified) = (Some(queue), true);
        }
    }
    fn detach(&mut self, index: u16) {
        if let Some(side) = self.sides.get_mut(usize::from(index)) {
            side.stop();
        }
        if usize::from(index) == TRANSMIT {
            self.printing = None;
        }
    }
    fn reset(&mut self) {
        self.sides.iter_mut().for_each(Side::stop);
        self.printing = None;
        self.input.clear();
        self.signals = Signals::default();
    }
    fn notify(&mut self, index: u16) {
        if let Some(side) = self.sides.get_mut(usize::from(index)) {
            side.notified = true;
        }
    }
    fn wants_service(&self) -> bool {
        self.sides[TRANSMIT].notified && !self.output.is_full()
            || self.sides[RECEIVE].notified && !self.input.is_empty()
    }
    fn serve(&mut self, mem: &mut dyn GuestMemory, _now: Nanos) {
        if self.exchange(mem).is_err() {
            self.sides.iter_mut().for_each(Side::stop);
            self.printing = None;
            self.signals.broken = true;
        }
    }
    fn take_signals(&mut self) -> Signals {
        core::mem::take(&mut self.signals)
    }
    fn has_output(&self) -> bool {
        !self.output.is_empty()
    }
    fn take_output(&mut self, print: &mut dyn FnMut(&[u8])) -> bool {
        let any = !self.output.is_empty();
        if any {
            print(&self.output);
            self.output.clear();
        }
        any
    }
    fn push_input(&mut self, bytes: &[u8]) -> Option<usize> {
        self.sides[RECEIVE].queue?;
        let typed = bytes.iter();
        Some(
            typed
                .take_while(|&&byte| self.input.push_back(byte).is_ok())
                .count(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, Ram, kinds};

    struct World {
        ram: Ram,
        console: Console,
        receive: Driver,
        transmit: Driver,
    }

    const DATA: u64 = 0x4_0000;

    fn world(kind: u64) -> World {
        let receive = Driver::new(0x1_0000, 8, kind);
        let transmit = Driver::new(0x2_0000, 8, kind);
        let mut console = Console::new(80, 25);
        console.start(kind);
        console.attach(0, receive.queue());
        console.attach(1, transmit.queue());
        World {
            ram: Ram::new(0x8_0000),
            console,
            receive,
            transmit,
        }
    }

    impl World {
        /// Serves until nothing is left, and gives what was printed.
        fn serve(&mut self) -> Vec<u8> {
            let mut printed = Vec::new();
            while self.console.wants_service() {
                self.console.serve(&mut self.ram, Nanos::ZERO);
                self.console.take_output(&mut |piece| printed.extend(piece));
            }
            printed
        }
    }

    use std::vec::Vec;

    #[test]
    fn what_the_driver_writes_is_printed_whole() {
        for kind in kinds() {
            let mut world = world(kind);
            let text: Vec<u8> = (0..5000u32).map(|n| n as u8).collect();
            world.ram.put(DATA, &text);
            let parts = [(DATA, 700, false), (DATA + 700, 4300, false)];
            world.transmit.want_interrupt(&mut world.ram, true);
            world.transmit.offer(&mut world.ram, &parts, true).unwrap();
            world
                .transmit
                .offer(&mut world.ram, &[(DATA, 5, false)], false);
            world.console.notify(1);
            let printed = world.serve();
            assert_eq!(printed.len(), 5005);
            assert!(printed.starts_with(&text) && printed.ends_with(&text[..5]));
            assert_eq!(world.console.take_signals().queues, 2);
            for _ in 0..2 {
                assert_eq!(world.transmit.take(&mut world.ram).unwrap().1, 0);
            }
        }
    }

    #[test]
    fn what_is_typed_comes_when_there_is_room() {
        for kind in kinds() {
            let mut world = world(kind);
            assert_eq!(world.console.push_input(b"hello"), Some(5));
            world.serve();
            world.receive.want_interrupt(&mut world.ram, true);
            world
                .receive
                .offer(&mut world.ram, &[(DATA, 3, true)], false);
            world
                .receive
                .offer(&mut world.ram, &[(DATA + 16, 16, true)], false);
            world.console.notify(0);
            world.serve();
            assert_eq!(world.console.take_signals().queues, 1);
            assert_eq!(world.receive.take(&mut world.ram).unwrap().1, 3);
            assert_eq!(world.receive.take(&mut world.ram).unwrap().1, 2);
            assert_eq!(world.ram.get(DATA), *b"hel");
            assert_eq!(world.ram.get(DATA + 16), *b"lo\0");
            assert_eq!(
                world.console.push_input(&[7; 300]),
                Some(256),
                "so many wait"
            );
            assert_eq!(world.console.push_input(b"x"), Some(0));
        }
    }

    #[test]
    fn the_emergency_register_prints_without_a_driver() {
        let mut console = Console::new(80, 25);
        for byte in b"help" {
            console.write_config(EMERGENCY, &[*byte, 0, 0, 0]);
        }
        console.write_config(0, &[9; 8]);
        let mut printed: Vec<u8> = Vec::new();
        assert!(console.has_output());
        assert!(console.take_output(&mut |piece| printed.extend(piece)));
        assert_eq!(printed, b"help");
        assert_eq!(console.push_input(b"x"), None, "nobody reads");
    }

    #[test]
    fn its_size_is_in_the_configuration_and_may_change() {
        let mut console = Console::new(80, 25);
        let mut bytes = [0; 12];
        console.read_config(0, &mut bytes);
        assert_eq!(bytes, [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        console.resize(0x120, 50);
        assert!(console.take_signals().config);
        console.read_config(1, &mut bytes[..2]);
        assert_eq!(bytes[..2], [1, 50]);
    }

    #[test]
    fn a_reset_forgets_what_was_under_way() {
        let mut world = world(0);
        let parts = [(DATA, 3000, false)];
        world.transmit.offer(&mut world.ram, &parts, false).unwrap();
        world.console.push_input(b"old");
        world.console.serve(&mut world.ram, Nanos::ZERO);
        world.console.reset();
        world.console.take_output(&mut |_| {});
        assert!(!world.console.wants_service());
        let mut fresh = Driver::new(0x3_0000, 8, 0);
        world.console.attach(1, fresh.queue());
        fresh.offer(&mut world.ram, &[(DATA, 4, false)], false);
        assert_eq!(world.serve().len(), 4);
    }

    #[test]
    fn broken_rings_stop_it() {
        let mut world = world(0);
        world
            .transmit
            .offer(&mut world.ram, &[(1 << 40, 4, false)], false);
        world.serve();
        assert!(world.console.take_signals().broken);
        assert_eq!(world.console.push_input(b"x"), None);
    }
}
