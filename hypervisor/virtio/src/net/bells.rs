//! What is said between a guest's function and who moves its frames without the device's lock: a
//! doorbell, or the look before each entry whether there is something to do, never waits for a
//! batch of frames that another core is at.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::device::Signals;

/// Among the signals, above the bits of the queues: the configuration space changed.
pub(super) const CONFIG: u64 = 1 << 63;
/// Among the signals: the driver broke the rules.
pub(super) const BROKEN: u64 = 1 << 62;

/// Among the notifications, where no queue is and [`super::SharedNet::has_notified`] looks: the
/// driver asked for something that is for the switch to grant.
pub(super) const ASKED: u64 = 1 << 63;

#[derive(Debug, Default)]
pub(super) struct Bells {
    /// A bit for each queue with news; [`ASKED`].
    notified: AtomicU64,
    /// A bit for each queue whose driver was not asked to notify, though nothing was left in it:
    /// somebody looks again before long, whoever comes first.
    silent: AtomicU64,
    /// A bit for each queue whose driver wants an interrupt; [`CONFIG`], [`BROKEN`].
    signals: AtomicU64,
    /// Queues that the function serves; none while the device is not ready.
    served: AtomicU64,
}

impl Bells {
    pub fn notify(&self, queues: u64) {
        self.notified.fetch_or(queues, Ordering::Release);
    }

    pub fn notified(&self) -> u64 {
        self.notified.load(Ordering::Acquire)
    }

    /// Takes the news of these queues; look into the queues afterwards.
    pub fn take(&self, queues: u64) -> u64 {
        match self.notified() & queues {
            0 => 0,
            _ => self.notified.fetch_and(!queues, Ordering::AcqRel) & queues,
        }
    }

    pub fn leave_silent(&self, queues: u64) {
        self.silent.fetch_or(queues, Ordering::Release);
    }

    pub fn silent(&self) -> u64 {
        self.silent.load(Ordering::Acquire)
    }

    /// Takes the silent queues; look into them afterwards.
    pub fn take_silent(&self) -> u64 {
        match self.silent() {
            0 => 0,
            _ => self.silent.swap(0, Ordering::AcqRel),
        }
    }

    /// These queues are gone.
    pub fn forget(&self, queues: u64) {
        self.take(queues);
        self.silent.fetch_and(!queues, Ordering::AcqRel);
    }

    pub fn signal(&self, signals: u64) {
        self.signals.fetch_or(signals, Ordering::Release);
    }

    pub fn signals(&self) -> u64 {
        self.signals.load(Ordering::Acquire)
    }

    pub fn take_signals(&self) -> Signals {
        if self.signals() == 0 {
            return Signals::default();
        }
        let signals = self.signals.swap(0, Ordering::AcqRel);
        Signals {
            queues: signals & !(CONFIG | BROKEN),
            config: signals & CONFIG != 0,
            broken: signals & BROKEN != 0,
        }
    }

    pub fn set_served(&self, queues: u64) {
        self.served.store(queues, Ordering::Release);
    }

    /// Whether the function has something to serve, or its driver is to hear of something, which
    /// is collected after a service.
    pub fn wants_service(&self) -> bool {
        self.signals() != 0 || self.notified() & self.served.load(Ordering::Acquire) != 0
    }

    pub fn set(&self, notified: u64, signals: u64) {
        self.notified.store(notified, Ordering::Release);
        self.silent.store(0, Ordering::Release);
        self.signals.store(signals, Ordering::Release);
    }
}
