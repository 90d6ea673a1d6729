//! Against the real kernel, in namespaces of the tests' own.

use std::net::UdpSocket;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podgate_core::packet::{Checksum, Gso};

use super::*;

/// From here to the end of a test's namespace; names need not differ, since each test has its own.
fn open_or_skip(queues: u16) -> Option<(Netns, Tun)> {
    let opened = Netns::anonymous().map_err(|error| error.to_string()).and_then(|netns| {
        let tun = Tun::open("pg0", queues, &netns).map_err(|error| error.to_string())?;
        Ok((netns, tun))
    });
    opened.inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

fn up(tun: &mut Tun, netns: &Netns) {
    tun.set_mtu(9000).unwrap();
    assert_eq!(tun.mtu().unwrap(), 9000);
    // An address with a prefix of 31 bits makes the other one reachable through the device.
    netns
        .run(|| {
            let mut config = tun::Configuration::default();
            config.tun_name("pg0").raw_fd(tun.queues[0].as_raw_fd()).close_fd_on_drop(false);
            let mut device = tun::create(&config).unwrap();
            device.set_address("10.9.0.1".parse().unwrap()).unwrap();
            device.set_netmask("255.255.255.0".parse().unwrap()).unwrap();
        })
        .unwrap();
    tun.bring_up().unwrap();
}

/// The next IPv4 packet from any of the queues (a new interface also sends router solicitations), at the start of `buf`.
fn next(queues: &[Queue], buf: &mut [u8]) -> (usize, Offload) {
    loop {
        let mut polled: Vec<_> = queues.iter().map(|queue| PollFd::new(queue.as_fd(), PollFlags::POLLIN)).collect();
        assert!(poll(&mut polled, PollTimeout::from(5000u16)).unwrap() > 0, "no frame within 5 s");
        for queue in queues {
            match queue.read(buf).unwrap() {
                Some((len, offload)) if buf[VNET_HEADER_LEN] >> 4 == 4 => {
                    buf.copy_within(VNET_HEADER_LEN.., 0);
                    return (len, offload);
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_datagram_is_read_and_its_answer_is_written() {
    let Some((netns, mut tun)) = open_or_skip(2) else { return };
    assert!(tun.features().checksum && tun.features().tso);
    up(&mut tun, &netns);
    let socket = netns.run(|| UdpSocket::bind("10.9.0.1:700").unwrap()).unwrap();
    socket.connect("10.9.0.2:900").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send(b"question").unwrap();
    let mut buf = vec![0; 70_000];
    let (len, offload) = next(&tun.queues, &mut buf);
    assert_eq!(offload, Offload { checksum: Checksum::Partial, gso: Gso::None });
    assert_eq!(&buf[12..24], &[10, 9, 0, 1, 10, 9, 0, 2, 700u16.to_be_bytes()[0], 700u16.to_be_bytes()[1], 3, 132]);
    assert_eq!(&buf[28..len], b"question");

    // Turned round: the header sum and the pseudo sum do not change when source and destination are exchanged.
    let (head, payload) = buf[..len].split_at_mut(28);
    head[12..20].rotate_left(4);
    head[20..24].rotate_left(2);
    payload.copy_from_slice(b"response");
    let header = [1, 0, 0, 0, 0, 0, 20, 0, 6, 0];
    tun.queues[1].write(&header, &[IoSlice::new(head), IoSlice::new(&payload[..3]), IoSlice::new(&payload[3..])]).unwrap();
    let mut answer = [0; 100];
    let len = socket.recv(&mut answer).unwrap();
    assert_eq!(&answer[..len], b"response");
}

#[test]
fn a_frame_longer_than_the_buffer_is_an_error_and_the_queue_goes_on() {
    let Some((netns, mut tun)) = open_or_skip(1) else { return };
    up(&mut tun, &netns);
    let socket = netns.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
    let queue = &tun.queues[0];
    let mut buf = vec![0; VNET_HEADER_LEN + 1028 + 1];
    while queue.read(&mut buf).unwrap().is_some() {}
    for (payload, fits) in [(1001, false), (1000, true)] {
        socket.send_to(&vec![7; payload], "10.9.0.2:900").unwrap();
        loop {
            poll(&mut [PollFd::new(queue.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000u16)).unwrap();
            match queue.read(&mut buf) {
                Ok(Some(_)) if buf[VNET_HEADER_LEN] >> 4 == 6 => continue,
                Ok(Some((len, _))) => assert!(fits && len == 1028),
                Ok(None) => continue,
                Err(error) => assert!(!fits && error.raw_os_error() == Some(libc::EMSGSIZE), "{error}"),
            }
            break;
        }
    }
}

#[test]
fn a_detached_queue_gets_nothing_until_it_is_attached_again() {
    let Some((netns, mut tun)) = open_or_skip(2) else { return };
    up(&mut tun, &netns);
    let socket = netns.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
    let mut buf = vec![0; 2000];
    tun.queues[1].set_attachment(Attachment::Detached).unwrap();
    assert_eq!(tun.queues[1].read(&mut buf).unwrap(), None);
    for port in 1000..1016 {
        socket.send_to(b"x", ("10.9.0.2", port)).unwrap();
        next(&tun.queues[..1], &mut buf);
    }
    assert_eq!(tun.queues[1].read(&mut buf).unwrap(), None);
    tun.queues[1].set_attachment(Attachment::Attached).unwrap();
    tun.queues[0].set_attachment(Attachment::Detached).unwrap();
    socket.send_to(b"x", "10.9.0.2:2000").unwrap();
    next(&tun.queues[1..], &mut buf);
}

#[test]
fn the_device_outlives_its_process_and_is_attached_to_again_but_not_twice() {
    let Some((netns, mut tun)) = open_or_skip(2) else { return };
    tun.set_mtu(4321).unwrap();
    assert!(matches!(Tun::open("pg0", 1, &netns), Err(TunError::Busy { queues: 2, .. })));
    drop(tun);
    let tun = Tun::open("pg0", 3, &netns).unwrap();
    assert_eq!((tun.mtu().unwrap(), tun.queues.len()), (4321, 3));
    drop(tun);
    assert_eq!(Tun::remove("pg0", &netns).unwrap(), Removed::Removed);
    assert_eq!(Tun::remove("pg0", &netns).unwrap(), Removed::Absent);
}

#[test]
fn queues_that_were_left_open_are_gone_on_with_and_what_waits_in_them_is_read() {
    let Some((netns, mut tun)) = open_or_skip(1) else { return };
    up(&mut tun, &netns);
    let left = |tun: &Tun| tun.queues.iter().map(|queue| queue.as_fd().try_clone_to_owned().unwrap()).collect::<Vec<_>>();
    let kept = left(&tun);
    drop(tun);
    let socket = netns.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
    socket.send_to(b"while nobody reads", "10.9.0.2:900").unwrap();
    // What else is given is closed and harms nothing: other files, another device's queue, one of the same name elsewhere.
    let (other_netns, other) = open_or_skip(1).unwrap();
    let beside = Tun::open("pg1", 1, &netns).unwrap();
    let mut given: Vec<OwnedFd> = vec![std::fs::File::open("/dev/null").unwrap().into(), UdpSocket::bind("127.0.0.1:0").unwrap().into()];
    given.push(OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap().into());
    given.extend(left(&other));
    given.extend(left(&beside));
    given.extend(kept.iter().map(|fd| fd.try_clone().unwrap()));
    let tun = Tun::open_with("pg0", 2, &netns, given).unwrap();
    assert!(tun.features().checksum && tun.features().tso);
    let mut buf = vec![0; 2000];
    let (len, _) = next(&tun.queues, &mut buf);
    assert_eq!(&buf[28..len], b"while nobody reads");
    // One too many is given back, though somebody has a handle on it still.
    let both = left(&tun);
    drop(tun);
    assert!(matches!(Tun::open("pg0", 1, &netns), Err(TunError::Busy { queues: 2, .. })));
    let copies = both.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let tun = Tun::open_with("pg0", 1, &netns, copies).unwrap();
    for port in 1000..1016 {
        socket.send_to(b"x", ("10.9.0.2", port)).unwrap();
        next(&tun.queues, &mut buf);
    }
    drop((other_netns, other));
}

#[test]
fn a_full_queue_is_counted_by_the_kernel_and_its_length_is_ours() {
    let Some((netns, mut tun)) = open_or_skip(1) else { return };
    up(&mut tun, &netns);
    let socket = netns.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    for _ in 0..QUEUE_LEN + 100 {
        let _ = socket.send_to(b"x", "10.9.0.2:900");
    }
    let losses = Tun::losses("pg0", &netns).unwrap().unwrap();
    assert!(losses.queue_full >= 50 && losses.not_taken == 0, "{losses:?}");
    let mut buf = vec![0; 2000];
    let waiting = std::iter::from_fn(|| tun.queues[0].read(&mut buf).unwrap()).count();
    assert_eq!(waiting, QUEUE_LEN as usize);
    assert_eq!(Tun::losses("pg1", &netns).unwrap(), None);
}

#[test]
fn other_devices_are_refused_by_what_they_are_and_left_alone() {
    let Some((netns, _tun)) = open_or_skip(1) else { return };
    netns
        .run(|| {
            for (name, layer) in [("single", tun::Layer::L3), ("tap", tun::Layer::L2)] {
                let mut config = tun::Configuration::default();
                config.tun_name(name).layer(layer);
                tun::create(&config).unwrap().persist().unwrap();
            }
        })
        .unwrap();
    for (name, found) in [("single", "a TUN with a single queue"), ("tap", "a TAP"), ("lo", "a device of the system")] {
        match Tun::open(name, 1, &netns) {
            Err(TunError::WrongKind { found: what, .. }) => assert_eq!(what, found),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(matches!(Tun::remove("tap", &netns), Err(TunError::WrongKind { .. })));
    assert!(matches!(Tun::open("a name", 1, &netns), Err(TunError::Name(_))));
    assert!(matches!(Tun::open("pg1", 0, &netns), Err(TunError::QueueCount { .. })));
}

#[test]
fn a_feature_that_is_switched_off_is_off_for_every_queue() {
    let Some((_netns, tun)) = open_or_skip(2) else { return };
    assert_eq!(tun.queues[1].disable(Feature::Uso).unwrap(), Features { checksum: true, tso: true, uso: false });
    assert_eq!(tun.queues[0].disable(Feature::Tso).unwrap(), Features { checksum: true, tso: false, uso: false });
    assert_eq!(tun.queues[0].disable(Feature::Checksum).unwrap(), Features::default());
    assert_eq!(tun.features(), tun.queues[1].features());
}
