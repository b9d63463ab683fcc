//! The life of a VM: its states, what moves it from one to the next, and what follows its end.
//!
//! One writer keeps a [`Life`] for each VM. It asks here what may be done and is told what to do
//! next; the doing is its own. Nothing here takes time from a clock.

use crate::config::{OnEnd, VmConfig};
use crate::vm::End;
use arch::Nanos;
use core::fmt;

/// A VM that ends sooner than this after its start waits before it starts again: twice as long
/// each time, up to [`LONGEST_WAIT`]. Else it could flood the log and the cores.
const SHORT_LIFE: u64 = 1_000_000_000;
/// In nanoseconds.
const FIRST_WAIT: u64 = 50_000_000;
/// In nanoseconds.
const LONGEST_WAIT: u64 = 5_000_000_000;

/// Where a VM stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Configured, and never started.
    Defined,
    /// To be started at this time.
    Starting(Nanos),
    /// Its vCPUs run, or would if they had something to do.
    Running,
    /// Its vCPUs are being taken off the cores, to stay as they are.
    Pausing,
    /// Its vCPUs stay as they are.
    Paused,
    /// Its vCPUs are being taken off the cores for good.
    Stopping,
    /// It ended by itself or by command; `held`: its memory is kept.
    Stopped {
        /// Whether its memory and state are kept to be looked at.
        held: bool,
    },
    /// It crashed; `held`: its memory is kept.
    Crashed {
        /// Whether its memory and state are kept to be looked at.
        held: bool,
    },
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Defined => "defined",
            Self::Starting(_) => "starting",
            Self::Running => "running",
            Self::Pausing | Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped { held: false } => "stopped",
            Self::Stopped { held: true } => "stopped, held",
            Self::Crashed { held: false } => "crashed",
            Self::Crashed { held: true } => "crashed, held",
        })
    }
}

/// What a person can ask of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Start it afresh.
    Start,
    /// Keep its vCPUs off the cores.
    Pause,
    /// Let them go on.
    Resume,
    /// Press its power button.
    Shutdown,
    /// End it and start it afresh.
    Reset,
    /// End it now.
    Stop,
    /// Raise a non-maskable interrupt.
    Nmi,
    /// Show what its vCPUs stand at.
    Dump,
}

impl Request {
    const fn name(self) -> &'static str {
        match self {
            Self::Start => "started",
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Shutdown => "shut down",
            Self::Reset => "reset",
            Self::Stop => "stopped",
            Self::Nmi => "given an NMI",
            Self::Dump => "dumped",
        }
    }
}

/// The request does not apply to the state that the VM is in; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is {state}: it cannot be {}", .request.name())]
pub struct Refused {
    /// What was asked.
    pub request: Request,
    /// The state.
    pub state: State,
}

/// What the writer does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Nothing.
    Nothing,
    /// Give back what the VM holds, and make it afresh at the time in [`State::Starting`].
    Start,
    /// Take its vCPUs off the cores; then [`Life::parked`].
    Park,
    /// Let its vCPUs run.
    Resume,
    /// Press its power button.
    PressButton,
    /// End it: take its vCPUs off the cores, then [`Life::ended`].
    End,
    /// Give back what it holds.
    Release,
    /// Raise a non-maskable interrupt.
    InjectNmi,
    /// Take its vCPUs off the cores for the dump, and then as [`Life::state`] says.
    ParkAndDump,
    /// Dump it: its vCPUs are off the cores.
    Dump,
}

/// What of a configuration decides over what follows an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// After it powered off, halted for good, or left by its debug-exit port.
    pub poweroff: OnEnd,
    /// After it reset itself.
    pub reboot: OnEnd,
    /// After a crash.
    pub crash: OnEnd,
}

impl From<&VmConfig> for Policy {
    fn from(config: &VmConfig) -> Self {
        Self {
            poweroff: config.on_poweroff,
            reboot: config.on_reboot,
            crash: config.on_crash,
        }
    }
}

/// A VM's life.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    state: State,
    policy: Policy,
    started: Nanos,
    /// How long it waited before its last start, in nanoseconds.
    wait: u64,
    /// A person wants it to start afresh after its end.
    restart: bool,
    /// How often it was started.
    starts: u32,
}

impl Life {
    /// A VM that is configured.
    #[must_use]
    pub const fn new(policy: Policy) -> Self {
        Self {
            state: State::Defined,
            policy,
            started: Nanos::ZERO,
            wait: 0,
            restart: false,
            starts: 0,
        }
    }

    /// Where it stands.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// How often it was started.
    #[must_use]
    pub const fn starts(&self) -> u32 {
        self.starts
    }

    /// Whether it runs, or will without anyone's doing: the machine goes on for it.
    #[must_use]
    pub const fn is_active(&self) -> bool {
        !matches!(
            self.state,
            State::Defined | State::Stopped { held: false } | State::Crashed { held: false }
        )
    }

    /// When it is to be started.
    #[must_use]
    pub const fn due(&self) -> Nanos {
        match self.state {
            State::Starting(at) => at,
            _ => Nanos::NEVER,
        }
    }

    /// A person asks for something.
    ///
    /// # Errors
    /// It does not apply.
    pub fn request(&mut self, request: Request, now: Nanos) -> Result<Do, Refused> {
        use State::{Crashed, Defined, Paused, Pausing, Running, Starting, Stopped, Stopping};
        let (state, action) = match (request, self.state) {
            (Request::Start, Defined | Stopped { .. } | Crashed { .. }) => {
                self.wait = 0;
                (Starting(now), Do::Start)
            }
            // Not to wait any longer.
            (Request::Start | Request::Reset, Starting(_)) => (Starting(now), Do::Start),
            (Request::Pause, Running) => (Pausing, Do::Park),
            (Request::Resume, Pausing | Paused) => (Running, Do::Resume),
            (Request::Shutdown, Running) => (Running, Do::PressButton),
            (Request::Reset, Running | Pausing | Paused) => {
                self.restart = true;
                (Stopping, Do::End)
            }
            (Request::Stop, Running | Pausing | Paused) => (Stopping, Do::End),
            (Request::Stop, Starting(_)) => (Stopped { held: false }, Do::Nothing),
            (Request::Stop, Stopped { held: true }) => (Stopped { held: false }, Do::Release),
            (Request::Stop, Crashed { held: true }) => (Crashed { held: false }, Do::Release),
            (Request::Nmi, Running | Pausing | Paused) => (self.state, Do::InjectNmi),
            (Request::Dump, Running | Pausing) => (self.state, Do::ParkAndDump),
            (Request::Dump, Paused | Stopped { held: true } | Crashed { held: true }) => {
                (self.state, Do::Dump)
            }
            (request, state) => return Err(Refused { request, state }),
        };
        self.state = state;
        Ok(action)
    }

    /// It was made and runs.
    pub const fn started(&mut self, now: Nanos) {
        self.state = State::Running;
        self.started = now;
        self.restart = false;
        self.starts = self.starts.saturating_add(1);
    }

    /// It could not be made.
    pub const fn failed(&mut self) {
        self.state = State::Stopped { held: false };
    }

    /// A vCPU brought the VM to its end: the others are to leave the cores.
    pub const fn ending(&mut self) {
        self.state = State::Stopping;
    }

    /// All its vCPUs are off the cores, for a pause.
    pub fn parked(&mut self) {
        if self.state == State::Pausing {
            self.state = State::Paused;
        }
    }

    /// All its vCPUs are off the cores, and it has ended so. `sound`: it can be kept.
    pub fn ended(&mut self, end: &End, sound: bool, now: Nanos) -> Do {
        let after = match end {
            _ if self.restart => OnEnd::Restart,
            End::Stopped => OnEnd::Stop,
            End::Reset => self.policy.reboot,
            End::Crashed(_) => self.policy.crash,
            End::PoweredOff | End::Halted | End::DebugExit(_) => self.policy.poweroff,
        };
        if after == OnEnd::Restart {
            self.wait = if !self.restart && now.since(self.started) < SHORT_LIFE {
                (self.wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT)
            } else {
                0
            };
            self.state = State::Starting(now + self.wait);
            return Do::Start;
        }
        let held = after == OnEnd::Hold && sound;
        self.state = match end {
            End::Crashed(_) => State::Crashed { held },
            _ => State::Stopped { held },
        };
        if held { Do::Nothing } else { Do::Release }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Core, KERNEL, Machine, ORIGIN};
    use crate::{Order, Stop};
    use alloc::string::ToString;
    use alloc::vec::Vec;
    use arch::{Exit, Gpr, IoExit};
    use machine::mock::MockVcpu;
    use sched::{CoreId, Decision, Scheduler, VcpuId, VmId};

    const POLICY: Policy = Policy {
        poweroff: OnEnd::Stop,
        reboot: OnEnd::Restart,
        crash: OnEnd::Stop,
    };

    fn running(policy: Policy) -> Life {
        let mut life = Life::new(policy);
        assert_eq!(life.request(Request::Start, Nanos(0)), Ok(Do::Start));
        life.started(Nanos(0));
        life
    }

    fn crash() -> End {
        End::Crashed("x".to_string())
    }

    #[test]
    fn requests_apply_to_the_states_they_are_for_and_change_nothing_else() {
        use Request::{Dump, Nmi, Pause, Reset, Resume, Shutdown, Start, Stop};
        let all = [Start, Pause, Resume, Shutdown, Reset, Stop, Nmi, Dump];
        let states = [
            (State::Defined, &[Start][..]),
            (State::Starting(Nanos(9)), &[Start, Reset, Stop]),
            (State::Running, &[Pause, Shutdown, Reset, Stop, Nmi, Dump]),
            (State::Pausing, &[Resume, Reset, Stop, Nmi, Dump]),
            (State::Paused, &[Resume, Reset, Stop, Nmi, Dump]),
            (State::Stopping, &[]),
            (State::Stopped { held: false }, &[Start]),
            (State::Stopped { held: true }, &[Start, Stop, Dump]),
            (State::Crashed { held: false }, &[Start]),
            (State::Crashed { held: true }, &[Start, Stop, Dump]),
        ];
        for (state, fine) in states {
            for request in all {
                let mut life = Life::new(POLICY);
                life.state = state;
                let result = life.request(request, Nanos(5));
                if fine.contains(&request) {
                    assert!(result.is_ok(), "{request:?} in {state:?}");
                } else {
                    assert_eq!(result, Err(Refused { request, state }));
                    assert_eq!(life.state(), state);
                }
            }
        }
        let error = Life::new(POLICY).request(Pause, Nanos(0)).unwrap_err();
        assert_eq!(error.to_string(), "it is defined: it cannot be paused");
    }

    #[test]
    fn a_pause_ends_where_it_began() {
        let mut life = running(POLICY);
        assert_eq!(life.request(Request::Pause, Nanos(1)), Ok(Do::Park));
        life.parked();
        assert_eq!(life.state(), State::Paused);
        assert!(life.is_active());
        assert_eq!(life.request(Request::Resume, Nanos(2)), Ok(Do::Resume));
        // One that was resumed before all had left is not paused by the last of them.
        life.request(Request::Pause, Nanos(3)).unwrap();
        life.request(Request::Resume, Nanos(3)).unwrap();
        life.parked();
        assert_eq!(life.state(), State::Running);
    }

    #[test]
    fn what_follows_an_end_is_configured() {
        for (end, after) in [
            (End::PoweredOff, State::Stopped { held: false }),
            (End::Halted, State::Stopped { held: false }),
            (End::DebugExit(1), State::Stopped { held: false }),
            (End::Stopped, State::Stopped { held: false }),
            (crash(), State::Crashed { held: false }),
        ] {
            let mut life = running(POLICY);
            life.ending();
            assert_eq!(life.ended(&end, true, Nanos(1)), Do::Release);
            assert_eq!(life.state(), after);
            assert!(!life.is_active());
        }
        let hold = Policy {
            poweroff: OnEnd::Restart,
            reboot: OnEnd::Stop,
            crash: OnEnd::Hold,
        };
        let mut life = running(hold);
        assert_eq!(life.ended(&crash(), true, Nanos(1)), Do::Nothing);
        assert_eq!(life.request(Request::Stop, Nanos(2)), Ok(Do::Release));
        let mut life = running(hold);
        assert_eq!(life.ended(&crash(), false, Nanos(1)), Do::Release);
        assert_eq!(life.ended(&End::PoweredOff, true, Nanos(1)), Do::Start);
        assert_eq!(life.ended(&End::Reset, true, Nanos(1)), Do::Release);
    }

    #[test]
    fn short_lives_wait_longer_each_time() {
        let mut life = running(POLICY);
        let mut now = Nanos(0);
        let mut waits = Vec::new();
        for _ in 0..9 {
            assert_eq!(life.ended(&End::Reset, true, now), Do::Start);
            waits.push((life.due().0 - now.0) / 1_000_000);
            now = life.due();
            life.started(now);
        }
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        // A long life, or a person's word, makes good for them.
        now = now + SHORT_LIFE;
        life.ended(&End::Reset, true, now);
        assert_eq!(life.due(), now);
        life.started(now);
        life.ended(&End::Reset, true, now);
        life.started(life.due());
        assert_eq!(life.request(Request::Reset, now), Ok(Do::End));
        assert_eq!(life.ended(&End::Stopped, true, now), Do::Start);
        assert_eq!(life.due(), now);
        assert_eq!(life.starts(), 12);
    }

    /// The guest's end by its own doing: value 0 to the debug-exit port.
    const LEAVE: Exit = Exit::Io(IoExit {
        port: 0xf4,
        size: 1,
        input: false,
        string: false,
        rep: false,
    });

    /// One life on one core, from its start to the release; gives how it ended.
    fn live(machine: &Machine, scheduler: &mut Scheduler, vcpus: u16, by_itself: bool) -> End {
        let (id, now) = (VmId(3), Nanos(0));
        let mut life = Life::new(POLICY);
        assert_eq!(life.request(Request::Start, now), Ok(Do::Start));
        let keys = alloc::format!("vcpus = {vcpus}\nmemory = \"4MiB\"");
        let mut cpus = machine
            .make(&keys, &mut || Ok(MockVcpu::protected()))
            .unwrap();
        scheduler
            .add_vm(id, vcpus, sched::Policy::default())
            .unwrap();
        life.started(now);
        scheduler.wake(VcpuId { vm: id, index: 0 }, now);
        if by_itself {
            cpus[0].vcpu.exits.push_back(LEAVE);
            cpus[0].vcpu.next_rip = Some(KERNEL + 2);
            cpus[0].vcpu.gprs[Gpr::Rax] = 0;
        } else {
            assert_eq!(life.request(Request::Stop, now), Ok(Do::End));
            cpus[0].vm().set_order(Order::Stop);
            for index in 1..vcpus {
                scheduler.wake(VcpuId { vm: id, index }, now);
            }
        }
        let mut core = Core {
            tsc: ORIGIN,
            patience: 2,
            armed: Vec::new(),
            output: Vec::new(),
            kicked: 0,
            looks: Vec::new(),
            frames: false,
        };
        let (mut end, mut out) = (End::Stopped, 0);
        while out < vcpus {
            let Decision::Run { vcpu, .. } = scheduler.next(CoreId(0), now) else {
                panic!("nobody runs, and {out} of {vcpus} have left");
            };
            let cpu = &mut cpus[usize::from(vcpu.index)];
            cpu.load(0, false);
            let stop = cpu.run(&mut core);
            cpu.unload(false);
            if let Stop::Ended(how) = stop {
                life.ending();
                end = how;
                cpu.vm().set_order(Order::Stop);
                for index in 1..vcpus {
                    scheduler.wake(VcpuId { vm: id, index }, now);
                }
            } else {
                assert_eq!(stop, Stop::Ordered);
            }
            scheduler.sleep(vcpu, Nanos::NEVER, now);
            out += 1;
        }
        assert_eq!(life.ended(&end, true, now), Do::Release);
        scheduler.remove_vm(id);
        end
    }

    #[test]
    fn ten_thousand_lives_leave_every_frame_and_no_vcpu_behind() {
        let machine = Machine::of(16 << 20);
        let mut scheduler = Scheduler::new();
        scheduler.add_core(CoreId(0), Nanos(0));
        for round in 0..10_000 {
            let vcpus = if round % 2 == 0 { 1 } else { 3 };
            let by_itself = round % 3 == 0;
            let end = live(&machine, &mut scheduler, vcpus, by_itself);
            assert_eq!(end == End::DebugExit(1), by_itself, "{end:?}");
            assert_eq!(machine.free_bytes(), machine.total, "round {round}");
            let idle = scheduler.next(CoreId(0), Nanos(0));
            assert_eq!(
                idle,
                Decision::Idle {
                    until: Nanos::NEVER
                }
            );
        }
    }
}
