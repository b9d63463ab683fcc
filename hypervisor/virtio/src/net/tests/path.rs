//! Frames out of and into the queues: what passes, what is dropped and why, who is told when.

use machine::pci::PciFunction;

use super::*;
use crate::pci::VirtioPci;

const PLAIN: [u8; 12] = [0; 12];
const BASIC: u64 = features::VERSION_1 | feature::MAC | feature::STATUS | feature::MTU;

/// TCP in IPv4 to [`MAC`], its checksum partial, with a header to segment it if `size` is not 0.
fn tcp(payload: usize, size: u16) -> ([u8; 12], Vec<u8>) {
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0]].concat();
    frame.extend((40 + payload as u16).to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0]);
    // 10.0.0.1, 10.0.0.2, TCP, the length.
    let sum = 0x0a00 + 1 + 0x0a00 + 2 + 6 + (20 + payload as u32);
    let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
    frame.extend(sum.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|n| n as u8));
    let [low, high] = size.to_le_bytes();
    let kind = u8::from(size != 0);
    ([1, kind, 54, 0, low, high, 34, 0, 16, 0, 0, 0], frame)
}

fn all_rings(test: impl FnMut(u64)) {
    testing::kinds().for_each(test);
}

#[test]
fn a_frame_goes_out_however_it_lies_in_memory() {
    all_rings(|ring| {
        let mut guest = Guest::new(EVERYTHING | ring);
        let mut random = Random(3);
        for length in [14, 15, 60, 600, 1514] {
            let frame = frame_to(MAC, length);
            for _ in 0..20 {
                let lengths: Vec<usize> = (0..random.below(8))
                    .map(|_| random.below(40) as usize)
                    .collect();
                guest.send_in(0, &[&PLAIN[..], &frame].concat(), &lengths);
                assert_eq!(guest.transmit(0), [(NetHeader::default(), frame.clone())]);
                assert_eq!(guest.sent(0), 1);
            }
        }
        assert_eq!(guest.device().counters().out_frames, 100);
        assert_eq!(
            guest.device().counters().out_bytes,
            20 * (14 + 15 + 60 + 600 + 1514)
        );
    });
}

#[test]
fn frames_of_a_batch_stay_in_the_buffer() {
    let mut guest = Guest::new(EVERYTHING);
    for n in 0..10 {
        guest.send(0, PLAIN, &frame_to(MAC, 60 + n));
    }
    let mut buffer = vec![0; FRAME_ROOM + 3 * 12 + 60 + 61 + 62];
    let mut frames = Vec::new();
    let net = guest.net.clone();
    let done = net
        .lock()
        .transmit(&mut guest.ram, 0, 8, Ask::Now, &mut buffer, |_, frame| {
            frames.push(frame.bytes())
        });
    // Room for one more of any length is kept.
    assert_eq!(
        done,
        Transmitted {
            chains: 4,
            more: true,
            silent: false
        }
    );
    assert_eq!(
        frames.iter().map(|frame| frame.len()).collect::<Vec<_>>(),
        [60, 61, 62, 63]
    );
    let (done, frames) = guest.transmit_with(0, 4, Ask::Now);
    assert_eq!((done.chains, done.more, frames.len()), (4, true, 4));
    let (done, frames) = guest.transmit_with(0, 4, Ask::Now);
    assert_eq!((done.chains, done.more, frames.len()), (2, false, 2));
}

#[test]
fn every_cause_to_drop_a_frame_of_the_guest() {
    let (gso, big) = tcp(5000, 1000);
    let (partial, small) = tcp(100, 0);
    let with = |mut header: [u8; 12], at: usize, value: u8| {
        header[at] = value;
        header
    };
    for (features, header, frame, want) in [
        (
            EVERYTHING,
            PLAIN,
            &frame_to(MAC, 13),
            Some(TransmitDrop::Short),
        ),
        (EVERYTHING, PLAIN, &vec![], Some(TransmitDrop::Short)),
        (EVERYTHING, PLAIN, &frame_to(MAC, 1514), None),
        (
            EVERYTHING,
            PLAIN,
            &frame_to(MAC, 1515),
            Some(TransmitDrop::Long),
        ),
        (
            EVERYTHING,
            PLAIN,
            &frame_to(MAC, MAX_FRAME),
            Some(TransmitDrop::Long),
        ),
        (
            EVERYTHING,
            PLAIN,
            &frame_to(MAC, MAX_FRAME + 1),
            Some(TransmitDrop::Long),
        ),
        (EVERYTHING, gso, &big, None),
        (EVERYTHING, with(gso, 5, 6), &big, Some(TransmitDrop::Long)),
        (EVERYTHING, partial, &small, None),
        (BASIC, partial, &small, Some(TransmitDrop::NotNegotiated)),
        (BASIC | feature::CSUM, partial, &small, None),
        (
            BASIC | feature::CSUM,
            gso,
            &big,
            Some(TransmitDrop::NotNegotiated),
        ),
        (
            EVERYTHING,
            with(partial, 7, 1),
            &small,
            Some(TransmitDrop::Checksum),
        ),
        (
            EVERYTHING,
            with(partial, 8, 2),
            &small,
            Some(TransmitDrop::Checksum),
        ),
        (
            EVERYTHING,
            with(gso, 1, 7),
            &big,
            Some(TransmitDrop::Segmentation),
        ),
        (
            EVERYTHING,
            with(with(gso, 4, 0), 5, 0),
            &big,
            Some(TransmitDrop::Segmentation),
        ),
    ] {
        let mut guest = Guest::new(features);
        guest.send(0, header, frame);
        let passed = guest.transmit(0).len();
        assert_eq!(guest.sent(0), 1, "it comes back in any case: {want:?}");
        let counters = *guest.device().counters();
        assert_eq!(
            (passed, counters.out_frames),
            (usize::from(want.is_none()), passed as u64)
        );
        let dropped: u64 = counters.out_drops.iter().sum();
        assert_eq!(
            dropped,
            want.map_or(0, |cause| counters.out_dropped(cause)),
            "{want:?}"
        );
        assert_eq!(dropped, u64::from(want.is_some()), "{want:?}");
    }
    let mut guest = Guest::new(EVERYTHING);
    guest.device().set_link(false);
    guest.send(0, PLAIN, &frame_to(MAC, 60));
    assert_eq!((guest.transmit(0).len(), guest.sent(0)), (0, 1));
    assert_eq!(
        guest
            .device()
            .counters()
            .out_dropped(TransmitDrop::LinkDown),
        1
    );
    // Not even a whole header.
    let mut guest = Guest::new(EVERYTHING);
    guest.send_in(0, &[0; 11], &[]);
    assert_eq!((guest.transmit(0).len(), guest.sent(0)), (0, 1));
}

#[test]
fn every_cause_to_drop_a_frame_for_the_guest() {
    type Prepare = fn(&mut Guest);
    let cases: [(Prepare, Vec<u8>, ReceiveDrop); 9] = [
        (
            |guest| guest.net.reset(),
            frame_to(MAC, 60),
            ReceiveDrop::NotReady,
        ),
        (
            |guest| guest.net.detach(0),
            frame_to(MAC, 60),
            ReceiveDrop::NotReady,
        ),
        (
            |guest| guest.device().set_link(false),
            frame_to(MAC, 60),
            ReceiveDrop::LinkDown,
        ),
        (|_| {}, frame_to([2; 6], 60), ReceiveDrop::Address),
        (
            |guest| guest.stock(0, 1, 2000),
            [&MAC[..], &[2; 6], &[0x81, 0, 0, 5, 8, 0]].concat(),
            ReceiveDrop::Vlan,
        ),
        (
            |guest| guest.stock(0, 1, 2000),
            frame_to(MAC, 1515),
            ReceiveDrop::Long,
        ),
        (
            |guest| guest.stock(0, 2, 71),
            frame_to(MAC, 60),
            ReceiveDrop::Long,
        ),
        (
            |guest| guest.stock(0, 1, 2000),
            frame_to(MAC, 13),
            ReceiveDrop::Malformed,
        ),
        (|_| {}, frame_to(MAC, 60), ReceiveDrop::NoBuffer),
    ];
    for (prepare, frame, want) in cases {
        let mut guest = Guest::new(EVERYTHING & !feature::MRG_RXBUF);
        prepare(&mut guest);
        assert_eq!(guest.hear(&frame), Err(want));
        assert_eq!(guest.settle().queues, 0);
        assert!(guest.received(0).is_empty());
        let counters = *guest.device().counters();
        assert_eq!(counters.in_dropped(want), 1);
        assert_eq!(
            (counters.in_drops.iter().sum::<u64>(), counters.in_frames),
            (1, 0)
        );
    }
}

#[test]
fn a_dropped_frame_costs_no_buffer() {
    all_rings(|ring| {
        let mut guest = Guest::new(EVERYTHING | ring);
        // Two buffers of 100 bytes: a frame of 300 does not fit, the next one does.
        guest.stock(0, 2, 100);
        assert_eq!(guest.hear(&frame_to(MAC, 300)), Err(ReceiveDrop::NoBuffer));
        assert_eq!(guest.hear(&frame_to(MAC, 188)), Ok(()));
        guest.settle();
        let [received] = &guest.received(0)[..] else {
            panic!()
        };
        assert_eq!(received.frame, frame_to(MAC, 188));
    });
}

#[test]
fn a_frame_comes_in_whole_or_over_several_buffers() {
    all_rings(|ring| {
        let mut guest = Guest::with(
            NetConfig {
                mtu: 9000,
                ..NetConfig::new(MAC)
            },
            EVERYTHING | ring,
        );
        for (buffer, length, buffers) in [
            (2048, 60, 1),
            (72, 60, 1),
            (71, 60, 2),
            (512, 1514, 3),
            (12, 60, 6),
            (1536, 9014, 6),
            (100, 9014, 91),
        ] {
            guest.stock(0, buffers, buffer);
            guest.rings[0].driver.want_interrupt(&mut guest.ram, true);
            assert_eq!(
                guest.hear(&frame_to(MAC, length)),
                Ok(()),
                "{length} into {buffer}"
            );
            assert!(guest.received(0).is_empty(), "not before it is settled");
            assert_eq!(guest.settle().queues, bit(0));
            let [received] = &guest.received(0)[..] else {
                panic!()
            };
            assert_eq!(received.frame, frame_to(MAC, length));
            let mut header = [0; 12];
            header[10] = buffers as u8;
            assert_eq!(received.header, header);
        }
        // More buffers than are taken for a frame.
        guest.stock(0, 255, 12);
        assert_eq!(guest.hear(&frame_to(MAC, 9014)), Err(ReceiveDrop::Long));
    });
}

#[test]
fn a_receive_buffer_without_room_for_a_header_breaks_the_rules() {
    for features in [EVERYTHING, BASIC] {
        let mut guest = Guest::new(features);
        guest.stock(0, 1, 11);
        assert_eq!(guest.hear(&frame_to(MAC, 60)), Err(ReceiveDrop::NotReady));
        assert!(guest.settle().broken);
        assert_eq!(
            guest.device().fault(),
            Some(QueueError::Request {
                found: 11,
                wanted: 12
            })
        );
        // It stands until it is reset.
        guest.send(0, PLAIN, &frame_to(MAC, 60));
        assert_eq!(guest.transmit(0).len(), 0);
        assert!(!guest.net.wants_service());
        guest.net.reset();
        guest.net.start(features);
        assert!(guest.device().ready());
    }
}

#[test]
fn a_ring_that_lies_breaks_the_device_but_gives_back_what_was_taken() {
    let mut guest = Guest::new(EVERYTHING);
    guest.send(0, PLAIN, &frame_to(MAC, 60));
    guest.offer(tx(0), &[(MEMORY, 100, false)]);
    let (done, frames) = guest.transmit_with(0, 10, Ask::Now);
    assert_eq!(
        (done, frames.len()),
        (
            Transmitted {
                chains: 1,
                more: false,
                silent: false
            },
            1
        )
    );
    assert_eq!(guest.sent(0), 1);
    assert!(guest.net.take_signals().broken);
    let mut guest = Guest::new(EVERYTHING);
    guest.offer(rx(0), &[(MEMORY - 20, 100, true)]);
    assert_eq!(guest.hear(&frame_to(MAC, 60)), Err(ReceiveDrop::NotReady));
    assert!(guest.settle().broken);
}

#[test]
fn a_frame_that_stands_behind_its_header_arrives_like_one_that_does_not() {
    let tag = |mut frame: Vec<u8>| {
        frame.splice(12..12, [0x81, 0, 0, 5]);
        (PLAIN, frame)
    };
    for (header, frame) in [
        (PLAIN, frame_to(MAC, 60)),
        (PLAIN, frame_to(MAC, 1514)),
        tag(frame_to(MAC, 100)),
        tcp(5000, 1448),
        tcp(100, 0),
    ] {
        for receiver in [
            EVERYTHING,
            BASIC,
            BASIC | feature::GUEST_CSUM,
            BASIC | feature::MRG_RXBUF,
            EVERYTHING | features::RING_PACKED,
        ] {
            for room in [100, 1526, 8000] {
                let mut sender = Guest::new(EVERYTHING);
                sender.send(0, header, &frame);
                let (net, mut buffer) = (sender.net.clone(), vec![0; FRAME_ROOM]);
                let mut sent = None;
                net.lock()
                    .transmit(&mut sender.ram, 0, 1, Ask::Now, &mut buffer, |h, f| {
                        sent = Some((h, f))
                    });
                let (header, whole) = sent.unwrap();
                assert_eq!(whole.bytes(), frame);
                let arrives = |frame: Frame<'_>| {
                    let mut guest = Guest::new(receiver);
                    guest.stock(0, 100, room);
                    let net = guest.net.clone();
                    let outcome = net.lock().receive(&mut guest.ram, &header, &frame);
                    guest.settle();
                    let all = guest.received(0).into_iter();
                    let all: Vec<_> = all.map(|one| (one.header, one.frame)).collect();
                    (outcome, all)
                };
                assert_eq!(
                    arrives(whole.frame()),
                    arrives(Frame::whole(whole.bytes())),
                    "{receiver:#x} {room}"
                );
            }
        }
    }
}

#[test]
fn what_the_receiver_took_over_is_passed_on_and_the_rest_is_done() {
    let (header, frame) = tcp(5000, 1448);
    let csum = BASIC | feature::GUEST_CSUM;
    for (receiver, flags, frames) in [
        // As it came.
        (EVERYTHING, [1, 1], 1),
        (csum | feature::GUEST_TSO4, [1, 1], 1),
        // Segmented; the checksums are left or done.
        (csum, [1, 0], 4),
        (csum | feature::GUEST_TSO6, [1, 0], 4),
        (BASIC, [0, 0], 4),
    ] {
        let mut sender = Guest::new(EVERYTHING);
        sender.send(0, header, &frame);
        let (header, sent) = sender.transmit(0).remove(0);
        let mut guest = Guest::new(receiver);
        guest.stock(0, 8, 8000);
        assert_eq!(guest.receive(&header, &sent), Ok(()));
        assert_eq!(guest.settle().queues, bit(0));
        let received = guest.received(0);
        assert_eq!(received.len(), frames);
        assert_eq!(guest.device().counters().in_frames, frames as u64);
        let mut payload = Vec::new();
        for one in &received {
            assert_eq!(one.header[..2], flags);
            payload.extend_from_slice(&one.frame[54..]);
            if flags == [0, 0] {
                assert_eq!(one.header[2..], [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
                // The pseudo header, then the segment: right if the sum is all ones.
                let mut sum = 0x0a00 + 1 + 0x0a00 + 2 + 6 + (one.frame.len() as u32 - 34);
                for word in one.frame[34..].chunks(2) {
                    sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
                }
                assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
            }
        }
        assert_eq!(payload, frame[54..]);
    }
    // An offload that the driver switched off, and a frame that lost its headers on the way.
    let header = NetHeader::check(header, EVERYTHING, &frame).unwrap();
    let mut guest = Guest::new(EVERYTHING);
    guest.stock(0, 8, 8000);
    assert_eq!(guest.command(5, 0, &[0; 8]), 0);
    assert_eq!(guest.receive(&header, &frame), Ok(()));
    assert_eq!(guest.device().counters().in_frames, 4);
    guest.stock(0, 8, 8000);
    assert_eq!(guest.command(5, 0, &feature::GUEST_TSO4.to_le_bytes()), 0);
    assert_eq!(
        guest.receive(&header, &frame),
        Ok(()),
        "not without its checksum"
    );
    assert_eq!(guest.device().counters().in_frames, 8);
    assert_eq!(
        guest.receive(&header, &frame[..50]),
        Err(ReceiveDrop::Malformed)
    );
    // Segments that are longer than the receiver's MTU.
    let config = NetConfig {
        mtu: 1400,
        ..NetConfig::new(MAC)
    };
    let mut guest = Guest::with(config, EVERYTHING);
    guest.stock(0, 8, 8000);
    assert_eq!(guest.receive(&header, &frame), Err(ReceiveDrop::Long));
}

#[test]
fn congestion_is_told_only_to_who_knows_of_it() {
    let (mut header, mut frame) = tcp(3000, 1000);
    header[1] |= 0x80;
    frame[47] |= 0x80;
    let header = NetHeader::check(header, EVERYTHING, &frame).unwrap();
    for (features, frames) in [(EVERYTHING, 1), (EVERYTHING & !feature::GUEST_ECN, 3)] {
        let mut guest = Guest::new(features);
        guest.stock(0, 8, 8000);
        assert_eq!(guest.receive(&header, &frame), Ok(()));
        guest.settle();
        let received = guest.received(0);
        assert_eq!(received.len(), frames);
        assert_eq!(received[0].header[1], if frames == 1 { 0x81 } else { 0 });
    }
}

#[test]
fn when_segments_run_out_of_buffers_the_rest_is_dropped() {
    let (header, frame) = tcp(5000, 1000);
    let header = NetHeader::check(header, EVERYTHING, &frame).unwrap();
    let mut guest = Guest::new(BASIC);
    guest.stock(0, 3, 2000);
    assert_eq!(guest.receive(&header, &frame), Err(ReceiveDrop::NoBuffer));
    guest.settle();
    assert_eq!(guest.received(0).len(), 3);
    assert_eq!(
        guest.device().counters().in_dropped(ReceiveDrop::NoBuffer),
        1
    );
}

#[test]
fn a_driver_without_filters_gets_everything() {
    let mut guest = Guest::new(BASIC);
    guest.stock(0, 4, 2000);
    for to in [MAC, [2; 6], [1; 6], [0xff; 6]] {
        assert_eq!(guest.hear(&frame_to(to, 60)), Ok(()));
    }
    // The MTU counts without tags.
    let mut tagged = frame_to(MAC, 1514);
    for tags in 1..=3 {
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        guest.stock(0, 1, 2000);
        assert_eq!(guest.hear(&tagged), Ok(()), "{tags}");
    }
    // Of many, three are looked at.
    let mut tagged = frame_to(MAC, 60);
    (0..9).for_each(|_| drop(tagged.splice(12..12, [0x81, 0, 0, 5])));
    guest.stock(0, 1, 2000);
    assert_eq!(guest.hear(&tagged), Ok(()));
    // A tag cut off.
    assert_eq!(guest.hear(&tagged[..16]), Err(ReceiveDrop::Malformed));
}

#[test]
fn flows_keep_to_their_pair() {
    let flow = |n: u8, back: bool| {
        let (_, mut frame) = tcp(10, 0);
        frame[35] = n;
        if back {
            frame[26..34].rotate_left(4);
            frame[34..38].rotate_left(2);
        }
        frame
    };
    let config = NetConfig {
        pairs: 4,
        ..NetConfig::new(MAC)
    };
    let mut guest = Guest::with(config, EVERYTHING | feature::MQ);
    let counts = |guest: &mut Guest| [0, 1, 2, 3].map(|pair| guest.received(pair).len());
    (0..4).for_each(|pair| guest.stock(pair, 250, 128));
    // At first all come by the first pair.
    (0..40).for_each(|n| guest.hear(&flow(n, true)).unwrap());
    assert_eq!(guest.settle().queues, bit(0));
    assert_eq!(counts(&mut guest), [40, 0, 0, 0]);
    // Then they are spread over those in use.
    assert_eq!(guest.command(4, 0, &[3, 0]), 0);
    guest.net.take_signals();
    (0..90).for_each(|n| guest.hear(&flow(n, true)).unwrap());
    assert_eq!(guest.settle().queues, bit(0) | bit(2) | bit(4));
    let spread = counts(&mut guest);
    assert!(
        spread[..3].iter().all(|&count| count > 10) && spread[3] == 0,
        "{spread:?}"
    );
    // Answers follow the pair that the guest sends on.
    for n in 0..20 {
        guest.send(2, PLAIN, &flow(n, false));
    }
    guest.transmit(2);
    (0..20).for_each(|n| guest.hear(&flow(n, true)).unwrap());
    guest.settle();
    assert_eq!(counts(&mut guest), [0, 0, 20, 0]);
    // A queue that is being reset is passed by; with none left there is no way in.
    guest.net.detach(rx(2));
    (0..20).for_each(|n| guest.hear(&flow(n, true)).unwrap());
    guest.settle();
    assert_eq!(counts(&mut guest), [20, 0, 0, 0]);
    guest.net.detach(rx(0));
    guest.net.detach(rx(1));
    assert_eq!(guest.hear(&flow(0, true)), Err(ReceiveDrop::NotReady));
    // Never to one that is no longer in use.
    guest.renew(rx(0));
    guest.renew(rx(2));
    guest.stock(0, 20, 128);
    guest.stock(2, 20, 128);
    assert_eq!(guest.command(4, 0, &[1, 0]), 0);
    guest.net.take_signals();
    (0..20).for_each(|n| guest.hear(&flow(n, true)).unwrap());
    assert_eq!(guest.settle().queues, bit(rx(0)));
}

/// Whether the driver is to notify when it adds to a transmit queue (split ring).
fn notifies(guest: &Guest) -> bool {
    guest.rings[1].driver.must_notify(&guest.ram, (0, true))
}

#[test]
fn notifications_are_off_while_frames_keep_coming() {
    let mut guest = Guest::new(EVERYTHING);
    assert!(notifies(&guest));
    assert!(
        !guest.rings[0].driver.must_notify(&guest.ram, (0, true)),
        "never for buffers to receive into"
    );
    for _ in 0..3 {
        guest.send(0, PLAIN, &frame_to(MAC, 60));
    }
    assert_eq!(guest.net.take_notified(), 1);
    assert_eq!(guest.net.take_notified(), 0);
    // Out of budget: called again in any case.
    let (done, _) = guest.transmit_with(0, 2, Ask::Now);
    assert_eq!((done.more, notifies(&guest)), (true, false));
    // Empty: asked for, and nothing came meanwhile.
    let (done, _) = guest.transmit_with(0, 2, Ask::Now);
    assert_eq!((done.chains, done.more, notifies(&guest)), (1, false, true));
    // A driver that keeps sending is not asked while there are frames, ...
    for (ask, frames, silent) in [
        (Ask::Idle, 1, true),
        (Ask::Idle, 1, true),
        (Ask::Never, 1, true),
        (Ask::Never, 0, true),
        // ... and only when a look has found none.
        (Ask::Idle, 0, false),
        (Ask::Idle, 1, true),
        (Ask::Now, 0, false),
    ] {
        (0..frames).for_each(|_| guest.send(0, PLAIN, &frame_to(MAC, 60)));
        let (done, _) = guest.transmit_with(0, 2, ask);
        assert_eq!((done.chains, done.silent), (frames, silent), "{ask:?}");
        assert_eq!((done.more, notifies(&guest)), (false, !silent), "{ask:?}");
    }
}

#[test]
fn a_silent_queue_is_looked_at_by_whoever_comes_first() {
    let mut guest = Guest::new(EVERYTHING);
    guest.net.take_notified();
    guest.net.leave_silent(0);
    assert!(!guest.net.has_notified(), "nobody need look at once");
    // Where it is put back, nobody is there who promised to look.
    let saved = guest.net.lock().save();
    assert_eq!(guest.net.take_notified(), 1);
    assert_eq!(guest.net.take_notified(), 0);
    guest.net.lock().restore(saved);
    assert!(guest.net.has_notified());
    assert_eq!(guest.net.take_notified(), 1);
    // A queue that is taken away, or a device that is reset, has nothing left behind.
    guest.net.leave_silent(0);
    guest.net.detach(tx(0));
    assert_eq!(guest.net.take_notified(), 0);
    guest.net.leave_silent(0);
    guest.net.reset();
    assert_eq!(guest.net.take_notified(), 0);
}

#[test]
fn the_driver_is_told_once_for_a_batch() {
    let mut guest = Guest::new(EVERYTHING | features::RING_EVENT_IDX);
    let event = guest.rings[1].driver.layout.driver.as_u64() + 4 + 2 * u64::from(SIZE);
    // An interrupt is wanted when the fifth is back.
    guest.ram.put(event, &4u16.to_le_bytes());
    for _ in 0..8 {
        guest.send(0, PLAIN, &frame_to(MAC, 60));
    }
    for (budget, want) in [(3, 0), (3, bit(1)), (3, 0)] {
        guest.transmit_with(0, budget, Ask::Now);
        assert_eq!(guest.net.take_signals().queues, want);
    }
    // The same into the receive queue: of three frames the second is waited for.
    let event = guest.rings[0].driver.layout.driver.as_u64() + 4 + 2 * u64::from(SIZE);
    guest.ram.put(event, &1u16.to_le_bytes());
    guest.stock(0, 4, 100);
    (0..3).for_each(|_| guest.hear(&frame_to(MAC, 60)).unwrap());
    assert_eq!(guest.settle().queues, bit(0));
    guest.hear(&frame_to(MAC, 60)).unwrap();
    assert_eq!(guest.settle().queues, 0);
    assert_eq!(guest.settle(), Signals::default());
}

#[test]
fn configuration_space_and_link() {
    let config = NetConfig {
        mtu: 9000,
        pairs: 3,
        speed: 40_000,
        ..NetConfig::new(MAC)
    };
    let mut guest = Guest::with(config, EVERYTHING);
    let mut space = [0xee; 17];
    assert_eq!(guest.net.config_size(), 17);
    guest.net.read_config(0, &mut space);
    assert_eq!(
        space,
        [
            2, 0, 0, 0, 0, 1, 1, 0, 3, 0, 0x28, 0x23, 0x40, 0x9c, 0, 0, 1
        ]
    );
    let mut one = [0];
    guest.net.read_config(16, &mut one);
    assert_eq!(one, [1]);
    guest.net.take_signals();
    for (up, told) in [(true, false), (false, true), (false, false), (true, true)] {
        guest.device().set_link(up);
        assert_eq!(
            (guest.status() == 1, guest.net.take_signals().config),
            (up, told)
        );
        assert_eq!(guest.device().link(), up);
    }
    // A driver that has no status hears nothing of it; the link outlives a reset.
    let mut guest = Guest::new(EVERYTHING & !(feature::STATUS | feature::GUEST_ANNOUNCE));
    guest.device().set_link(false);
    assert!(!guest.net.take_signals().config);
    guest.net.reset();
    assert!(!guest.device().link());
}

#[test]
fn what_is_offered_and_what_goes_together() {
    let make = |config| NetDevice::new(config).map(SharedNet::new);
    let one = make(NetConfig::new(MAC)).unwrap();
    assert_eq!((one.kind(), one.class(), one.queues()), (1, 0x02_0000, 3));
    assert_eq!(one.features(), feature::ALL & !feature::MQ);
    let four = make(NetConfig {
        pairs: 4,
        offer: !feature::HOST_USO,
        ..NetConfig::new(MAC)
    })
    .unwrap();
    assert_eq!(four.features(), feature::ALL & !feature::HOST_USO);
    assert_eq!(
        [0, 7, 8].map(|index| four.queue_size(index)),
        [1024, 1024, 64]
    );
    assert!(one.accepts(0) && one.accepts(feature::ALL));
    // What needs something that is not offered is not offered either.
    let bare = NetConfig {
        offer: !(feature::CSUM | feature::GUEST_CSUM | feature::CTRL_VQ),
        ..NetConfig::new(MAC)
    };
    let bare = make(bare).unwrap().features();
    assert!(one.accepts(bare) && bare & (feature::HOST_ECN | feature::GUEST_ECN) == 0);
    let function = VirtioPci::new(one.clone()).unwrap();
    let config = function.config();
    assert_eq!(config.get(0, 4), 0x1041_1af4);
    assert_eq!(config.get(8, 4) >> 8, 0x02_0000);
    for (feature, needs) in feature::NEEDS {
        assert!(!one.accepts(feature), "{feature:#x}");
        assert!(!one.accepts(feature::ALL & !needs), "{feature:#x}");
    }
    for (config, want) in [
        (
            NetConfig {
                mtu: 67,
                ..NetConfig::new(MAC)
            },
            NetConfigError::Mtu(67),
        ),
        (
            NetConfig {
                pairs: 0,
                ..NetConfig::new(MAC)
            },
            NetConfigError::Pairs(0),
        ),
        (
            NetConfig {
                pairs: 32,
                ..NetConfig::new(MAC)
            },
            NetConfigError::Pairs(32),
        ),
        (NetConfig::new([1; 6]), NetConfigError::Mac),
        (NetConfig::new([0; 6]), NetConfigError::Mac),
    ] {
        assert_eq!(make(config).err(), Some(want));
    }
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    all_rings(|ring| {
        let mut guest = Guest::new(EVERYTHING | ring);
        guest.stock(0, 8, 50);
        guest.command(0, 0, &[1]);
        guest.send(0, PLAIN, &frame_to(MAC, 60));
        guest.send(0, PLAIN, &frame_to(MAC, 61));
        guest.transmit_with(0, 1, Ask::Now);
        // Put into the queue, not yet shown.
        guest.hear(&frame_to([2; 6], 60)).unwrap();
        let state = guest.device().save();
        let config = *guest.device().config();
        let mut other = NetDevice::new(config).unwrap();
        other.restore(state.clone());
        assert_eq!(other.save(), state);
        guest.net = SharedNet::new(other);
        guest.hear(&frame_to([2; 6], 62)).unwrap();
        assert_eq!(guest.settle().queues & 1, 1);
        let lengths: Vec<usize> = guest
            .received(0)
            .iter()
            .map(|one| one.frame.len())
            .collect();
        assert_eq!(lengths, [60, 62]);
        assert_eq!(guest.transmit(0)[0].1.len(), 61);
        assert_eq!(guest.sent(0), 2);
    });
}

#[test]
fn random_rings_and_frames_never_panic() {
    let mut random = Random(11);
    for round in 0..400u64 {
        let ring = if round % 2 == 0 {
            0
        } else {
            features::RING_PACKED
        };
        let index = if round % 4 < 2 {
            0
        } else {
            features::RING_EVENT_IDX
        };
        let indirect = features::RING_INDIRECT_DESC;
        let drop = 1 << random.below(24);
        let features = (EVERYTHING | ring | index | indirect) & !drop;
        let mut guest = Guest::new(
            if SharedNet::accepts(&Guest::new(EVERYTHING).net, features) {
                features
            } else {
                EVERYTHING | ring
            },
        );
        guest.stock(0, 4, 200);
        for _ in 0..3 {
            let (mut header, mut frame) = tcp(random.below(3000) as usize, 500);
            header[random.below(12) as usize] = random.next() as u8;
            frame[random.below(54) as usize] = random.next() as u8;
            let length = random.below(60) as usize;
            guest.send_in(0, &[&header[..], &frame].concat(), &[length]);
        }
        for _ in 0..random.below(60) {
            let at = RINGS + random.below(3) * RING + random.below(0x3a00);
            let at = if random.below(2) == 0 {
                at & !0xfff | random.below(128)
            } else {
                at
            };
            guest.ram.put(at, &[random.next() as u8]);
        }
        for _ in 0..4 {
            let (_, frames) = guest.transmit_with(
                0,
                8,
                [Ask::Now, Ask::Idle, Ask::Never][random.below(3) as usize],
            );
            for (header, frame) in frames {
                let _ = guest.receive(&header, &frame);
            }
            guest.settle();
            guest.net.notify(2);
            guest.net.serve(&mut guest.ram, Nanos::ZERO);
        }
    }
}

#[test]
fn the_function_negotiates_for_it_and_tells_its_driver() {
    let mut guest = Guest::new(EVERYTHING);
    let mut function = VirtioPci::new(guest.net.clone()).unwrap();
    // Decode memory, be bus master.
    function.config_mut().write(4, 2, 6);
    function.config_written(4, 2);
    let mut put = |offset: u64, size: u8, value: u64| {
        function.write(0, offset, size, value, Nanos::ZERO);
        function.read(0, offset, size, Nanos::ZERO)
    };
    put(0x14, 1, 0);
    put(0x14, 1, 3);
    for select in 0..2 {
        put(0x08, 4, select);
        put(0x0c, 4, EVERYTHING >> (32 * select) & 0xffff_ffff);
    }
    assert_eq!(put(0x14, 1, 0x0b), 0x0b);
    for index in 0..3u64 {
        guest.rings[index as usize] = Ring::new(index as u16, EVERYTHING);
        let layout = guest.rings[index as usize].driver.layout;
        put(0x16, 2, index);
        put(0x18, 2, layout.size.into());
        put(0x20, 8, layout.descriptors.as_u64());
        put(0x28, 8, layout.driver.as_u64());
        put(0x30, 8, layout.device.as_u64());
        put(0x1c, 2, 1);
    }
    assert!(!guest.device().ready());
    assert_eq!(put(0x14, 1, 0x0f), 0x0f);
    assert!(guest.device().ready());
    for (command, ready) in [(2, false), (6, true)] {
        guest.net.take_notified();
        function.config_mut().write(4, 2, command);
        function.config_written(4, 2);
        assert_eq!(guest.device().ready(), ready, "it may reach memory or not");
        assert_eq!(guest.net.take_notified() != 0, ready, "what was missed");
    }
    // The doorbell of the transmit queue is for who moves frames, not for the run loop.
    assert!(
        function.wants_service(),
        "the receive queue is told to be quiet"
    );
    function.serve(&mut guest.ram, Nanos::ZERO);
    guest.net.take_notified();
    function.write(0, 0x4000 + 4, 2, 1, Nanos::ZERO);
    assert!(!function.wants_service());
    assert_eq!(guest.net.take_notified(), 1);
    // A frame that somebody else puts in reaches the driver as an interrupt.
    guest.stock(0, 1, 2000);
    assert_eq!(guest.hear(&frame_to(MAC, 60)), Ok(()));
    let net = guest.net.clone();
    net.lock().settle(&mut guest.ram);
    assert!(function.wants_service() && !function.interrupt());
    function.serve(&mut guest.ram, Nanos::ZERO);
    assert_eq!(function.take_message(), None);
    assert!(function.interrupt());
}

#[test]
fn random_frames_arrive_whole_in_random_buffers() {
    all_rings(|ring| {
        let mut random = Random(ring | 5);
        let config = NetConfig {
            mtu: 9000,
            ..NetConfig::new(MAC)
        };
        let mut guest = Guest::with(config, EVERYTHING | ring);
        let (mut sent, mut got, mut dropped) = (Vec::new(), Vec::new(), 0);
        for _ in 0..400 {
            // Buffers of one to three parts, some of them empty, with room for a header.
            for _ in 0..random.below(4) {
                let lengths = [12 + random.below(900), random.below(40), random.below(3)];
                let parts: Vec<Part> = lengths[..1 + random.below(3) as usize]
                    .iter()
                    .map(|&length| (guest.room(length as usize), length as u32, true))
                    .collect();
                if guest.rings[0].pending.len() < 60 {
                    guest.offer(0, &parts);
                }
            }
            let frame = frame_to(MAC, 14 + random.below(3000) as usize);
            let (one, two) = (random.below(20) as usize, random.below(3000) as usize);
            let (one, two) = (one.min(frame.len()), two.clamp(one, frame.len().max(one)));
            let pieces = [&frame[..one], &frame[one..two], &frame[two..]];
            let net = guest.net.clone();
            let header = NetHeader::default();
            match net
                .lock()
                .receive(&mut guest.ram, &header, &Frame::new(pieces))
            {
                Ok(()) => sent.push(frame),
                Err(cause) => {
                    assert_eq!(cause, ReceiveDrop::NoBuffer);
                    dropped += 1;
                }
            }
            if random.below(3) == 0 {
                guest.settle();
                got.extend(guest.received(0).into_iter().map(|one| one.frame));
            }
        }
        guest.settle();
        got.extend(guest.received(0).into_iter().map(|one| one.frame));
        assert!(sent == got && !sent.is_empty());
        let counters = *guest.device().counters();
        assert_eq!(counters.in_frames, sent.len() as u64);
        assert_eq!(counters.in_dropped(ReceiveDrop::NoBuffer), dropped);
    });
}

#[test]
fn doorbells_ring_while_a_batch_is_under_way() {
    let mut guest = Guest::new(EVERYTHING);
    let net = guest.net.clone();
    let batch = net.lock();
    guest.net.notify(2);
    assert!(guest.net.wants_service() && !guest.net.has_signals());
    guest.net.notify(1);
    assert_eq!(guest.net.take_notified(), 1);
    assert_eq!(guest.net.take_signals(), Signals::default());
    drop(batch);
}
