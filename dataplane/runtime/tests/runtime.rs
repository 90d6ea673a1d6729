//! The whole dataplane on real devices: two nodes with their gateways, pods in namespaces of their own, real sockets at the ends.
//!
//! Skipped, with the reason printed, where namespaces or TUN devices are not permitted, or there is no `ip` (iproute2).

mod nodes;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nodes::*;
use podgate_core::addr::protocol;
use podgate_core::balance::Balance;
use podgate_core::service::{Backend, Face, Frontend, FrontendKey, Place, ServicePort, TrafficPolicy};
use podgate_core::snapshot::{Generation, Masquerade, Peer, Snapshot};
use podgate_core::verdict::{DropReason, WorkerId};
use podgate_runtime::tun::Feature;

#[test]
fn pods_talk_on_one_node_and_between_two_in_superframes_by_one_worker() {
    pods_talk(1);
}

#[test]
fn pods_talk_on_one_node_and_between_two_in_superframes_by_three_workers() {
    pods_talk(3);
}

fn pods_talk(workers: u16) {
    let Some((mut one, mut two)) = two_nodes() else { return };
    (one.workers, two.workers) = (workers, workers);
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    for v4 in [true, false] {
        datagram(&one.pods[0], &one.pods[1], one.pod(1, v4), 1000);
        datagram(&one.pods[0], &two.pods[1], two.pod(1, v4), 1000);
        // In fragments, which the kernel at either end cuts and joins.
        datagram(&one.pods[0], &one.pods[1], one.pod(1, v4), 9000);
        datagram(&one.pods[0], &two.pods[1], two.pod(1, v4), 9000);
        stream(&one.pods[0], &one.pods[1], one.pod(1, v4), 16 * MIB);
        stream(&one.pods[0], &two.pods[1], two.pod(1, v4), 16 * MIB);
        stream(&two.pods[0], &one.pods[1], one.pod(1, v4), 16 * MIB);
    }
    for (runtime, name) in [(&first, "first"), (&second, "second")] {
        let (frames, bytes) = (sum(runtime, |c| c.overlay_rx.frames.value()), sum(runtime, |c| c.overlay_rx.bytes.value()));
        let tx = (sum(runtime, |c| c.pods_tx.frames.value()), sum(runtime, |c| c.pods_tx.packets.value()), sum(runtime, |c| c.pods_tx.bytes.value()));
        let latency = runtime.latency();
        println!(
            "{name}: overlay {} B/frame, pods tx {:?} {} B/frame, {:?}, {:?}, p50 {} ns, pipeline p50 {} ns, batch p99 {}",
            bytes / frames.max(1),
            tx,
            tx.2 / tx.0.max(1),
            runtime.features(),
            drops(runtime),
            latency.packet_ns.value_at_quantile(0.5),
            latency.pipeline_ns.value_at_quantile(0.5),
            latency.batch_len.value_at_quantile(0.99)
        );
        assert!(!latency.packet_ns.is_empty() && latency.batch_len.len() == latency.packet_ns.len());
        assert!(tx.2 / tx.0 > 3 * u64::from(POD_MTU), "the pods are written superframes");
        let features = runtime.features();
        assert!(features.tso.on && features.udp_gso.on, "{features:?}");
        assert!(runtime.kernel_drops().is_ok());
        assert!(runtime.workers().iter().all(|worker| worker.alive && worker.restarts == 0 && worker.read_error == 0));
    }
    first.stop();
    second.stop();
}

#[test]
fn superframes_cross_an_underlay_of_ipv6_and_udps_keep_their_boundaries() {
    for wire in [Wire::V6, Wire::V4] {
        let Some((one, two)) = two_nodes_over(wire) else { return };
        let first = one.start(Some(&two), |_, _| {}).unwrap();
        let second = two.start(Some(&one), |_, _| {}).unwrap();
        for v4 in [true, false] {
            for (to, address) in [(&one.pods[1], one.pod(1, v4)), (&two.pods[1], two.pod(1, v4))] {
                datagram(&one.pods[0], to, address, 9000);
                for (size, count, last) in [(1000, 10, 300), (1000, 10, 0), (1300, 40, 1), (100, 63, 7)] {
                    superdatagram(&one.pods[0], to, address, size, count, last);
                }
                stream(&one.pods[0], to, address, 4 * MIB);
            }
        }
        for (from, to) in [(&first, &second), (&second, &first)] {
            let sent = || (sum(from, |c| c.overlay_tx.packets.value()), sum(from, |c| c.overlay_tx.bytes.value()));
            let received = || (sum(to, |c| c.overlay_rx.packets.value()), sum(to, |c| c.overlay_rx.bytes.value()));
            wait("what is sent is received", || sent() == received());
        }
        assert!(sum(&first, |c| c.overlay_tx.frames.value()) * 4 < sum(&first, |c| c.overlay_tx.packets.value()));
        for runtime in [&first, &second] {
            assert!(runtime.features().udp_gso.on && runtime.features().tso.on, "{:?}", runtime.features());
            assert_eq!(runtime.features().udp_gso.refusals + runtime.features().tso.refusals + runtime.features().uso.refusals, 0);
        }
        first.stop();
        second.stop();
    }
}

#[test]
fn where_the_kernel_takes_no_superframes_they_are_cut_in_software() {
    let Some((one, two)) = two_nodes() else { return };
    // The pods' TUN still brings superframes, and both are written as if the kernel refused them.
    let first = one
        .start(Some(&two), |_, host| {
            host.queues[0].disable(Feature::Tso).unwrap();
        })
        .unwrap();
    let second = two
        .start(Some(&one), |_, host| {
            host.queues[0].disable(Feature::Tso).unwrap();
        })
        .unwrap();
    assert!(!first.features().tso.on);
    for v4 in [true, false] {
        stream(&one.pods[0], &one.pods[1], one.pod(1, v4), 4 * MIB);
        stream(&one.pods[0], &two.pods[1], two.pod(1, v4), 4 * MIB);
    }
    for runtime in [&first, &second] {
        let (frames, packets) = (sum(runtime, |c| c.pods_tx.frames.value()), sum(runtime, |c| c.pods_tx.packets.value()));
        assert_eq!(frames, packets, "one packet in each frame");
        assert!(packets as usize > 4 * MIB / POD_MTU as usize);
    }
}

#[test]
fn a_pod_reads_the_status_page_at_the_gateways_address() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    for v4 in [true, false] {
        let gateway = SocketAddr::new(one.gateway_address(v4), 80);
        let mut connection = one.pods[0].run(|| TcpStream::connect_timeout(&gateway, PATIENCE).unwrap()).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        connection.write_all(b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nthe gateway is well\n"), "{answer}");
    }
    runtime.stop();
}

#[test]
fn a_worker_that_panics_comes_back_and_flows_go_on() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let fastest = thread::scope(|scope| {
        let bulk = scope.spawn(|| stream(&one.pods[0], &one.pods[1], one.pod(1, true), 16 * MIB));
        let crash = |worker| {
            runtime.crash_worker(WorkerId(worker));
            let asked = Instant::now();
            wait("the worker is back", || runtime.workers()[usize::from(worker)].restarts == 1);
            println!("back after {:?}", asked.elapsed());
            asked.elapsed()
        };
        let fastest = [0, 1].map(crash).into_iter().min();
        bulk.join().unwrap();
        fastest
    });
    assert!(fastest < Some(Duration::from_millis(100)), "{fastest:?}");
    assert!(runtime.workers().iter().all(|worker| worker.alive));
    datagram(&one.pods[0], &one.pods[1], one.pod(1, true), 100);
}

#[test]
fn a_panic_is_one_line_even_where_backtraces_are_asked_for() {
    if two_nodes().is_none() {
        return;
    }
    // The variable is read once for each process, so this is another.
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["a_worker_that_panics_comes_back_and_flows_go_on", "--exact", "--nocapture"])
        .env("RUST_BACKTRACE", "full")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("panic")).collect();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.starts_with("worker-") && line.contains("/mod.rs:")), "{said}");
    assert!(!said.contains("backtrace"), "{said}");
}

#[test]
fn every_worker_takes_note_of_a_new_generation_and_its_pods() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(None, |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    wait("the first generation", || runtime.generations() == [Generation(1); 2]);
    runtime.publish(one.snapshot(2, Some(&two)));
    wait("the second generation", || runtime.generations() == [Generation(2); 2]);
    datagram(&one.pods[0], &two.pods[0], two.pod(0, true), 100);
    second.stop();
}

#[test]
fn a_path_that_shrinks_is_reported_and_senders_are_told_of_the_new_mtu() {
    let Some((one, two)) = two_nodes() else { return };
    let first = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    stream(&one.pods[0], &two.pods[0], two.pod(0, true), MIB);
    for node in [&one, &two] {
        node.netns.run(|| ip("link set wire mtu 1300")).unwrap();
    }
    let sender = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let mut reports = Vec::new();
    wait("a report of the path's MTU", || {
        sender.send_to(&[0; 1350], SocketAddr::new(two.pod(0, true), 9)).unwrap();
        reports = first.path_mtus();
        !reports.is_empty()
    });
    assert_eq!(reports[0], (two.underlay(), 1300));
    assert!(first.features().udp_gso.on);
    for (runtime, node, peer) in [(&first, &one, &two), (&second, &two, &one)] {
        let mut next = Snapshot::clone(&node.snapshot(2, Some(peer)));
        next.peers = next.peers.iter().cloned().map(|peer| Peer { mtu: 1300 - 36, ..peer }).collect();
        runtime.publish(Arc::new(next));
    }
    for v4 in [true, false] {
        stream(&one.pods[0], &two.pods[0], two.pod(0, v4), 4 * MIB);
    }
    assert!(first.features().udp_gso.on, "{:?}", first.features());
    let refused = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    // What was on its way when the MTU changed may have taught the kernel already: then a socket that lets it cut hears nothing.
    let never_cut = libc::IP_PMTUDISC_DO;
    let len = size_of_val(&never_cut) as libc::socklen_t;
    // SAFETY: the kernel reads an int of that length from a live value; the descriptor is the socket's.
    let set = unsafe { libc::setsockopt(refused.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, (&raw const never_cut).cast(), len) };
    assert_eq!(set, 0);
    refused.connect(SocketAddr::new(two.pod(0, true), 9)).unwrap();
    wait("the pod's own kernel has learnt the MTU", || refused.send(&[0; 1350]).is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE)));
    assert!(sum(&first, |c| c.answers.value()) > 0);
}

#[test]
fn a_node_ports_datagrams_in_fragments_reach_the_backend_and_a_port_that_is_taken_is_named() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let (ours, taken) = (SocketAddr::new(one.underlay(), 30053), SocketAddr::new(one.underlay(), 30054));
    let _holder = one.netns.run(|| UdpSocket::bind(taken).unwrap()).unwrap();
    runtime.set_udp_ports(vec![ours, taken]);
    wait("the port that is taken is named", || runtime.port_problems().len() == 1);
    assert_eq!(runtime.port_problems()[0].what, format!("UDP {taken}"));
    let server = one.pods[0].run(|| UdpSocket::bind((one.pod(0, true), 0)).unwrap()).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let backends: Arc<[Backend]> =
        Arc::new([Backend { addr: one.pod(0, true).into(), port: server.local_addr().unwrap().port(), place: Place::LocalPod }]);
    let service = Arc::new(ServicePort {
        id: 1,
        name: "default/echo".into(),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        cluster: Arc::clone(&backends),
        local: backends,
        balance: Balance::default(),
        affinity: None,
        source_ranges: Vec::new(),
    });
    let mut next = Snapshot::clone(&one.snapshot(2, Some(&two)));
    Arc::make_mut(&mut next.node).node_port_addresses = vec![one.underlay().into()];
    let key = FrontendKey::new(ours.ip(), ours.port(), protocol::UDP);
    next.services = next.services.with([(key, Some(Frontend { face: Face::NodePort, service }))]);
    runtime.publish(Arc::new(next));
    wait("the service", || runtime.generations() == [Generation(2); 2]);
    let outside = two.netns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let sent = pattern(9000);
    outside.send_to(&sent, ours).unwrap();
    let mut buffer = vec![0; 65_536];
    let (len, from) = receive(&server, &mut buffer);
    assert!(buffer[..len] == sent);
    assert_eq!(from.ip(), one.gateway_address(true), "a client from outside is masqueraded by the gateway's own address");
}

#[test]
fn a_pods_first_datagram_to_the_outside_and_its_answer_both_in_fragments_arrive() {
    let Some((one, two)) = two_nodes() else { return };
    // The second node runs no gateway here: it is the outside.
    let outside: [IpAddr; 2] = [two.underlay(), "2001:db8::2".parse().unwrap()];
    let sources: [IpAddr; 2] = [one.underlay(), "2001:db8::1".parse().unwrap()];
    for (node, v6) in [(&one, sources[1]), (&two, outside[1])] {
        node.netns.run(|| ip(&format!("address add {v6}/64 dev wire nodad"))).unwrap();
    }
    let runtime = one.start(None, |_, _| {}).unwrap();
    one.netns
        .run(|| {
            // A device without an IPv4 address is strict whatever its rp_filter.
            ip("address add 169.254.1.1/32 dev podgate scope host");
            sysctl("ipv4/conf/podgate/rp_filter", "2");
            sysctl("ipv4/conf/podgate/accept_local", "1");
            sysctl("ipv4/conf/podgate/forwarding", "1");
            sysctl("ipv4/conf/wire/forwarding", "1");
            sysctl("ipv6/conf/all/forwarding", "1");
            for (family, source) in [("-4", sources[0]), ("-6", sources[1])] {
                ip(&format!("{family} route add default dev podgate table 234"));
                ip(&format!("{family} rule add pref 11 to {source} ipproto udp dport 61000-61999 lookup 234"));
                ip(&format!("{family} rule add pref 100 lookup local"));
                ip(&format!("{family} rule del pref 0"));
            }
        })
        .unwrap();
    let mut next = Snapshot::clone(&one.snapshot(2, None));
    let node = Arc::make_mut(&mut next.node);
    node.addresses = sources.map(Into::into).to_vec();
    node.masquerade = Some(Masquerade { ports: vec![61000..=61999], source_v4: Some(sources[0].into()), source_v6: Some(sources[1].into()) });
    runtime.publish(Arc::new(next));
    wait("the masquerade", || runtime.generations() == [Generation(2); 2]);
    for address in outside {
        datagram(&one.pods[0], &two.netns, address, 100);
        for _ in 0..20 {
            datagram(&one.pods[0], &two.netns, address, 9000);
        }
    }
    let (sockets, lost) = runtime.masquerade_sockets();
    // Flows to different ports of the outside may share one of ours.
    assert!((20..=42).contains(&sockets) && lost == 0, "{sockets} sockets, {lost} flows without");
    runtime.stop();
}

#[test]
fn workers_whose_tuns_are_deleted_say_so_and_rest() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    let second = two.start(Some(&one), |_, _| {}).unwrap();
    datagram(&one.pods[0], &one.pods[1], one.pod(1, true), 100);
    let workers = threads_in(&one.netns, "worker-");
    assert_eq!(workers.len(), 2);
    one.gateway.run(|| ip("link del pods")).unwrap();
    wait("every worker has noticed", || runtime.workers().iter().all(|worker| worker.read_error == libc::EBADFD));
    assert!(runtime.inject_pods(&[0x45; 20]).is_err());
    let far = two.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    far.send_to(&[0; 100], (one.pod(0, true), 9)).unwrap();
    wait("what cannot be written is a drop with a name", || sum(&runtime, |counters| counters.drops(DropReason::WritePods)) == 1);
    one.netns.run(|| ip("link del podgate")).unwrap();
    // Pods go on sending, which nobody reads; a worker that starts anew meets the same.
    runtime.crash_worker(WorkerId(0));
    wait("the worker is back", || runtime.workers()[0].restarts == 1);
    let sender = one.pods[0].run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    let (before, started) = (cpu_time(&workers), Instant::now());
    while started.elapsed() < Duration::from_millis(500) {
        let _ = sender.send_to(&[0; 100], (one.pod(1, true), 9));
        thread::sleep(Duration::from_millis(10));
    }
    let used = cpu_time(&workers) - before;
    assert!(used < Duration::from_millis(50), "{used:?} of CPU in half a second with nothing to do");
    assert!(runtime.workers().iter().all(|worker| worker.alive && worker.silent_ms < 1000));
    second.stop();
    let stopping = Instant::now();
    runtime.stop();
    assert!(stopping.elapsed() < Duration::from_secs(2), "{:?}", stopping.elapsed());
}

#[test]
fn a_busy_overlay_port_is_named() {
    let Some((one, two)) = two_nodes() else { return };
    let _holder = one.netns.run(|| UdpSocket::bind(SocketAddr::new(one.underlay(), 4790)).unwrap()).unwrap();
    let error = one.start(Some(&two), |_, _| {}).err().expect("the port is taken");
    assert!(error.to_string().contains("192.0.2.1:4790"), "{error}");
}
