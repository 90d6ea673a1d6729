//! Pods with a TUN of their own beside pods with a veth, on real devices.
//!
//! Skipped, with the reason printed, where namespaces or TUN devices are not permitted, or there is no `ip` (iproute2).

mod nodes;

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use nodes::*;
use podgate_core::verdict::{DropReason, TunId, WorkerId};
use podgate_runtime::netns::Netns;
use podgate_runtime::pod_tun::PodTun;
use podgate_runtime::runtime::{PodTunError, Runtime};
use podgate_runtime::tun::{Removed, Tun};

/// Every pair of pods on `one`, and from it to `two`.
fn talk(one: &Node, two: &Node) {
    for v4 in [true, false] {
        let ways = [
            (&one.pods[0], &one.pods[1], one.pod(1, v4)),
            (&one.pods[1], &one.pods[0], one.pod(0, v4)),
            (&one.pods[0], &two.pods[0], two.pod(0, v4)),
            (&one.pods[1], &two.pods[1], two.pod(1, v4)),
            (&two.pods[1], &one.pods[0], one.pod(0, v4)),
        ];
        for (from, to, address) in ways {
            datagram(from, to, address, 1000);
            datagram(from, to, address, 9000);
            superdatagram(from, to, address, 1000, 10, 300);
            stream(from, to, address, 4 * MIB);
        }
    }
}

/// Opens what a runtime that has stopped has closed. A child that another test is just starting has it too, until it is another program.
fn reopen(pod: &Netns) -> PodTun {
    let mut opened = None;
    wait("its queue can be opened again", || {
        opened = PodTun::reopen("eth0", 2, pod).ok();
        opened.is_some()
    });
    opened.expect("it was waited for")
}

fn well(runtime: &Runtime) {
    // One may have carried all there was before another's thread has begun.
    wait("every worker has begun", || runtime.workers().iter().all(|worker| worker.alive));
    assert!(runtime.workers().iter().all(|worker| worker.alive && worker.restarts == 0 && worker.read_error == 0), "{:?}", runtime.workers());
    assert!(runtime.pod_tuns().iter().all(|tun| tun.read_error == 0), "{:?}", runtime.pod_tuns());
    // The TUN `host` has a link-local address here, and with it multicast reports.
    let dropped: Vec<_> = drops(runtime).into_iter().filter(|(reason, _)| *reason != DropReason::MartianDestination.name()).collect();
    assert_eq!(dropped, []);
}

/// Handles on a TUN's queues, as whoever keeps them for a successor has.
fn kept(tun: &PodTun) -> Vec<OwnedFd> {
    tun.descriptors().map(|fd| fd.try_clone_to_owned().unwrap()).collect()
}

#[test]
fn pods_of_both_kinds_talk_on_one_node_and_between_two_in_superframes() {
    for (kinds, workers) in [([Attach::Tun, Attach::Tun], 2), ([Attach::Tun, Attach::Veth], 3), ([Attach::Tun, Attach::Tun], 1)] {
        let Some((mut one, mut two)) = two_nodes() else { return };
        (one.attach, two.attach) = (kinds, [kinds[1], kinds[0]]);
        (one.workers, two.workers) = (workers, workers);
        let first = one.start(Some(&two), |_, _| {}).unwrap();
        let second = two.start(Some(&one), |_, _| {}).unwrap();
        talk(&one, &two);
        for runtime in [&first, &second] {
            let tx = (sum(runtime, |c| c.pods_tx.frames.value()), sum(runtime, |c| c.pods_tx.bytes.value()));
            assert!(tx.1 / tx.0 > 3 * u64::from(POD_MTU), "pods are written superframes: {tx:?}");
            well(runtime);
        }
    }
}

/// Sends `packet` as it is from a raw socket in the pod.
fn send_raw(pod: &Netns, source: [u8; 4], destination: [u8; 4], ttl: u8) {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, ttl, 17, 0, 0];
    packet.extend(source);
    packet.extend(destination);
    packet.extend([0x27, 0x0f, 0x27, 0x0f, 0, 8, 0, 0]);
    pod.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(socket2::Protocol::from(libc::IPPROTO_RAW))).unwrap();
        let to = std::net::SocketAddr::from((destination, 9999));
        socket.send_to(&packet, &to.into()).unwrap();
    })
    .unwrap();
}

#[test]
fn a_pod_sends_from_its_own_address_alone_even_where_others_are_on_the_same_node() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Tun, Attach::Tun];
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let octets = |ip: std::net::IpAddr| if let std::net::IpAddr::V4(ip) = ip { ip.octets() } else { panic!("not IPv4") };
    let (own, neighbour, gateway) = (octets(one.pod(0, true)), octets(one.pod(1, true)), octets(one.gateway_address(true)));
    let victim = one.pods[1].run(|| UdpSocket::bind("0.0.0.0:9999").unwrap()).unwrap();
    let forged = [neighbour, octets(two.pod(0, true)), gateway, octets(one.underlay()), [203, 0, 113, 7]];
    for source in forged {
        send_raw(&one.pods[0], source, neighbour, 64);
    }
    wait("every forged packet is counted", || sum(&runtime, |c| c.drops(DropReason::SpoofedByPod)) == forged.len() as u64);
    // The first that arrives is the honest one.
    send_raw(&one.pods[0], own, neighbour, 64);
    victim.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(receive(&victim, &mut [0; 64]).1.ip(), one.pod(0, true));
}

#[test]
fn a_pod_that_comes_later_is_read_and_one_that_goes_is_closed_while_others_talk() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Tun, Attach::Veth];
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    one.attach = [Attach::Tun, Attach::Tun];
    // It changes from a veth to a TUN: as another attachment of the same addresses.
    one.gateway.run(|| ip("link delete veth1")).unwrap();
    let tun = PodTun::make("eth0", 2, &one.pods[1]).unwrap();
    one.furnish(1);
    runtime.plug(TunId::new(1), tun).unwrap();
    let again = PodTun::make("eth1", 2, &one.pods[1]).unwrap();
    assert!(matches!(runtime.plug(TunId::new(1), again), Err(PodTunError::Taken(id)) if id == TunId::new(1)));
    runtime.publish(one.snapshot(2, Some(&two)));
    for v4 in [true, false] {
        stream(&one.pods[0], &one.pods[1], one.pod(1, v4), MIB);
        stream(&one.pods[1], &one.pods[0], one.pod(0, v4), MIB);
    }
    // It goes: its queue is closed, so that it can be opened again, by a successor for instance.
    let refused = PodTun::reopen("eth0", 2, &one.pods[1]);
    assert!(refused.is_err(), "its queue is taken");
    runtime.unplug(TunId::new(1));
    runtime.publish(one.snapshot(3, Some(&two)));
    let mut reopened = None;
    wait("its queue is closed", || {
        runtime.close_unplugged();
        reopened = PodTun::reopen("eth0", 2, &one.pods[1]).ok();
        reopened.is_some()
    });
    runtime.plug(TunId::new(7), reopened.unwrap()).unwrap();
    assert_eq!(runtime.pod_tuns().len(), 2);
    runtime.stop();
    reopen(&one.pods[0]);
}

#[test]
fn a_successor_opens_the_queues_again_or_takes_them_over_and_connections_go_on() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Tun, Attach::Tun];
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let server = one.pods[1].run(|| UdpSocket::bind((one.pod(1, true), 0)).unwrap()).unwrap();
    let client = one.pods[0].run(|| UdpSocket::bind((one.pod(0, true), 0)).unwrap()).unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let target = server.local_addr().unwrap();
    let exchange = || {
        client.send_to(b"?", target).unwrap();
        let from = receive(&server, &mut [0; 8]).1;
        server.send_to(b"!", from).unwrap();
        receive(&client, &mut [0; 8]);
    };
    exchange();
    first.stop();
    for adopted in [false, true] {
        let open = |pod| {
            let tun = reopen(pod);
            if !adopted {
                return tun;
            }
            let mut kept = kept(&tun).into_iter();
            drop(tun);
            // What is no queue of the device harms nothing.
            let strange = std::fs::File::open("/dev/null").unwrap();
            let adopted = PodTun::adopt(kept.next().unwrap(), kept.chain([strange.into()]), 2).unwrap();
            assert_eq!((adopted.name(), adopted.netns().id()), ("eth0", pod.id()));
            adopted
        };
        let tuns = one.pods.iter().enumerate().map(|(index, pod)| (TunId::new(index as u32), open(pod))).collect();
        let successor = one.start_with(Some(&two), tuns).unwrap();
        exchange();
        well(&successor);
        successor.stop();
    }
    assert!(PodTun::adopt(std::fs::File::open("/dev/null").unwrap().into(), [], 2).is_err());
}

#[test]
fn what_waits_in_any_queue_of_a_pods_tun_is_there_for_whoever_adopts_it() {
    let Some((one, _)) = two_nodes() else { return };
    let tun = PodTun::make("eth0", 4, &one.pods[0]).unwrap();
    one.furnish(0);
    let left = kept(&tun);
    assert_eq!(left.len(), 4);
    drop(tun);
    // Flows enough for every queue to get some, while nobody reads.
    let socket = one.pods[0].run(|| UdpSocket::bind((one.pod(0, true), 0)).unwrap()).unwrap();
    for port in 1000..1064 {
        socket.send_to(b"waits", (one.pod(1, true), port)).unwrap();
    }
    let mut left = left.into_iter();
    let adopted = PodTun::adopt(left.next().unwrap(), left, 4).unwrap();
    let waiting: Vec<usize> = kept(&adopted)
        .iter()
        .map(|queue| {
            let mut frame = [0; 2000];
            std::iter::from_fn(|| nix::unistd::read(queue, &mut frame).ok()).count()
        })
        .collect();
    // Solicitations and the like may be among them.
    assert!(waiting.iter().sum::<usize>() >= 64 && waiting.iter().filter(|count| **count > 0).count() > 1, "{waiting:?}");
}

#[test]
fn an_interface_that_is_deleted_in_the_pod_is_told_of_and_costs_its_worker_no_time() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Tun, Attach::Tun];
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    assert_eq!(PodTun::remove("eth0", &one.pods[0]).unwrap(), Removed::Removed);
    let broken = || runtime.pod_tuns().into_iter().find(|tun| tun.id == TunId::new(0)).unwrap();
    wait("the worker has noticed", || broken().read_error == libc::EBADFD);
    let workers = threads_in(&one.netns, "worker-");
    let used = cpu_time(&workers);
    // Some hundred rounds of each worker, by what it publishes of itself.
    let batches = || runtime.latency();
    for _ in 0..20 {
        batches();
    }
    // Each worker is told of it, and perhaps twice: the queue is closed, and so it has hung up.
    assert!(broken().read_errors <= 2 * u64::from(one.workers), "{} reads of what is gone", broken().read_errors);
    assert!(cpu_time(&workers) - used < Duration::from_millis(500));
    // What is sent to it is counted, and the others go on.
    let client = one.pods[1].run(|| UdpSocket::bind((one.pod(1, true), 0)).unwrap()).unwrap();
    client.send_to(b"x", (one.pod(0, true), 9)).unwrap();
    wait("it is counted", || sum(&runtime, |c| c.drops(DropReason::WritePod)) == 1);
    assert!(runtime.workers().iter().all(|worker| worker.read_error == 0));
    assert!(runtime.kernel_drops().is_ok());
}

#[test]
fn a_worker_that_panics_goes_on_reading_its_pods() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Tun, Attach::Tun];
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    datagram(&one.pods[0], &one.pods[1], one.pod(1, true), 100);
    for worker in 0..one.workers {
        runtime.crash_worker(WorkerId(worker));
    }
    wait("both are back", || runtime.workers().iter().all(|worker| worker.restarts == 1));
    for v4 in [true, false] {
        datagram(&one.pods[0], &one.pods[1], one.pod(1, v4), 100);
        datagram(&one.pods[1], &one.pods[0], one.pod(0, v4), 100);
    }
}

#[test]
fn what_found_a_pods_queue_full_is_counted_and_stays_so_when_the_pod_has_gone() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Veth, Attach::Tun];
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let before = runtime.kernel_drops().unwrap().pods_queue;
    let pod = Netns::anonymous().unwrap();
    let tun = PodTun::make("eth0", 2, &pod).unwrap();
    pod.run(|| ["link set eth0 up", "address add 10.244.1.9/32 dev eth0", "route add default dev eth0"].map(ip)).unwrap();
    let socket = pod.run(|| UdpSocket::bind("10.244.1.9:0").unwrap()).unwrap();
    socket.set_nonblocking(true).unwrap();
    for _ in 0..2 * podgate_runtime::tun::QUEUE_LEN {
        // The socket's own buffer may be full as well.
        let _ = socket.send_to(b"x", "10.244.1.2:9");
    }
    let lost = Tun::losses("eth0", &pod).unwrap().unwrap().queue_full;
    assert!(lost > 0);
    runtime.plug(TunId::new(9), tun).unwrap();
    assert_eq!(runtime.kernel_drops().unwrap().pods_queue - before, lost);
    runtime.unplug(TunId::new(9));
    runtime.publish(one.snapshot(2, Some(&two)));
    assert_eq!(runtime.kernel_drops().unwrap().pods_queue - before, lost);
}

#[test]
fn both_directions_of_a_connection_settle_on_one_worker() {
    let Some((mut one, two)) = two_nodes() else { return };
    one.attach = [Attach::Tun, Attach::Tun];
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let server = one.pods[1].run(|| UdpSocket::bind((one.pod(1, true), 0)).unwrap()).unwrap();
    let client = one.pods[0].run(|| UdpSocket::bind((one.pod(0, true), 0)).unwrap()).unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let frames = || runtime.counters().iter().map(|counters| counters.pods_rx.frames.value()).collect::<Vec<_>>();
    let mut before = Vec::new();
    for round in 0..200 {
        client.send_to(b"?", server.local_addr().unwrap()).unwrap();
        let from = receive(&server, &mut [0; 8]).1;
        server.send_to(b"!", from).unwrap();
        receive(&client, &mut [0; 8]);
        if round == 99 {
            before = frames();
        }
    }
    let mut since: Vec<u64> = frames().iter().zip(&before).map(|(now, before)| now - before).collect();
    since.sort_unstable();
    assert!(since[since.len() - 1] >= 190, "of the last 200 packets each worker read {since:?}");
}

#[test]
fn a_device_with_a_single_queue_is_no_pods_tun() {
    let Some((one, _two)) = two_nodes() else { return };
    if one.pods[0].run(|| Command::new("ip").args(["tuntap", "add", "lone", "mode", "tun"]).status().unwrap()).unwrap().success() {
        assert!(PodTun::make("lone", 2, &one.pods[0]).is_err() && PodTun::reopen("lone", 2, &one.pods[0]).is_err());
    }
    assert!(PodTun::reopen("none", 2, &one.pods[0]).unwrap_err().to_string().contains("none"));
    let runtime = one.start(None, |_, _| {}).unwrap();
    let narrow = PodTun::make("narrow", 1, &one.pods[0]).unwrap();
    assert!(matches!(runtime.plug(TunId::new(3), narrow), Err(PodTunError::Queues { queues: 1, workers: 2 })));
}
