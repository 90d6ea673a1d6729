//! The Kubernetes source against an API server: whatever happens on the way, in the end it has what a fresh list has.
//!
//! The server is the one in `tests/apiserver`, in this process and on a paused clock, so that an hour passes at once and a seed decides
//! everything. With `PODGATE_APISERVER=URL` in the environment the histories run against that one instead, in real time and without faults, with
//! the credentials of `KUBECONFIG` if it is set; objects are made and removed under names of the test's own.
//!
//! `PODGATE_KUBERNETES_HISTORIES` says how many histories (200; a thousand take three minutes), `PODGATE_KUBERNETES_SEED` which is the first. A failure names its seed.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use podgate::config::Overlay;
use podgate::model::{Announcement, ClusterState, ObjectKey, ObjectName};
use podgate::source::Source;
use podgate::source::kubernetes::{Timing, start_with};
use podgate_apiserver::{ApiServer, Faults, Rule, Use};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use support::{Cluster, Random, node, policy, service, slice};

const RBAC: &str = include_str!("../../deploy/kubernetes/rbac.yaml");
const OWN: &str = "node-1";
const OVERLAY: Overlay = Overlay { port: 4790, vni: 1, direct_return_vni: None };

/// On a paused clock, unless a real server is meant.
fn run<F: Future>(real: bool, work: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(!real).build().unwrap().block_on(work)
}

fn timing() -> Timing {
    // Pages so small that every list has several.
    Timing { page: 4, ..Timing::default() }
}

/// A source that knows nothing of before.
async fn start(cluster: &Cluster, seed: u64) -> Source {
    let nothing = tempfile::tempdir().unwrap();
    start_in(&nothing, cluster, seed).await
}

/// A source that keeps what it knows in `state`.
async fn start_in(state: &TempDir, cluster: &Cluster, seed: u64) -> Source {
    start_with(cluster.client(), OWN, state.path(), timing(), seed).await.unwrap()
}

/// Waits until the source has what the server has, and says so.
async fn settle(source: &mut Source, cluster: &Cluster, patience: Duration) -> Result<(), String> {
    let start = Instant::now();
    loop {
        let fresh = cluster.fresh().await;
        let status = source.status.borrow().clone();
        if **source.state.borrow() == fresh && status.connected && status.errors.is_empty() && status.objects == fresh.len() {
            return Ok(());
        }
        if start.elapsed() > patience {
            return Err(format!("after {patience:?} it is not what it should be: {status:?}\n{}", difference(&source.state.borrow(), &fresh)));
        }
        sleep(Duration::from_millis(500)).await;
    }
}

fn difference(had: &ClusterState, fresh: &ClusterState) -> String {
    let keys = |state: &ClusterState| -> BTreeSet<ObjectKey> {
        let key = |kind: &str, name: &ObjectName| ObjectKey { kind: kind.into(), name: name.clone() };
        let mut keys: BTreeSet<ObjectKey> = state.unenforced().iter().cloned().collect();
        keys.extend(state.services().keys().map(|name| key("Service", name)));
        keys.extend(state.nodes().keys().map(|name| key("Node", &ObjectName::new("", name))));
        keys.extend(state.all_slices().values().flat_map(|slices| slices.values()).map(|slice| key("EndpointSlice", &slice.name)));
        keys
    };
    let (had, fresh) = (keys(had), keys(fresh));
    let show = |keys: Vec<&ObjectKey>| keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!("too many: {}\nmissing: {}", show(had.difference(&fresh).collect()), show(fresh.difference(&had).collect()))
}

/// One step of a history.
async fn step(cluster: &Cluster, random: &mut Random) {
    let number = random.below(12);
    match random.below(12) {
        0..=2 => cluster.put(service(number, random.below(3))).await,
        3..=5 => cluster.put(slice(number, random.below(12), random.below(4))).await,
        6 => cluster.delete("services", "default", &format!("web-{number}")).await,
        7 => cluster.delete("endpointslices", "default", &format!("slice-{number}")).await,
        8 => cluster.put(node(1 + number % 4, random.below(3))).await,
        9 => cluster.delete("nodes", "", &format!("node-{}", 1 + number % 4)).await,
        10 => cluster.put(policy(number % 3)).await,
        _ => cluster.delete("networkpolicies", "default", &format!("policy-{}", number % 3)).await,
    }
}

async fn history(seed: u64, real: bool) -> Result<(), String> {
    let mut random = Random::new(seed);
    let cluster = if real { Cluster::real(seed).await } else { Cluster::of(ApiServer::new(Faults::all(seed)), None) };
    for number in 0..random.below(12) {
        cluster.put(service(number, 0)).await;
        cluster.put(slice(number, number, 2)).await;
    }
    cluster.put(node(1, 0)).await;
    // An empty list is believed where nothing was known, until the next audit lists anew.
    let patience = if real { Duration::from_secs(90) } else { 2 * timing().audit };
    let kept = tempfile::tempdir().unwrap();
    let started = timeout(patience, start_in(&kept, &cluster, seed)).await;
    let mut source = started.map_err(|_| format!("nothing was listed within {patience:?}"))?;
    let announced = Announcement::annotations(&["192.0.2.1".parse().unwrap()], &OVERLAY, 1500);
    source.announce(announced.clone());
    for _ in 0..random.between(5, 60) {
        match (random.below(20), cluster.server()) {
            // Unheard of by the source: additions and removals while nobody answers, and at times everything that led there is forgotten.
            (0, Some(server)) => {
                server.set_outage(true);
                for _ in 0..random.below(15) {
                    step(&cluster, &mut random).await;
                }
                sleep(Duration::from_millis(random.below(90_000))).await;
                if random.below(2) == 0 {
                    server.compact();
                }
                server.set_outage(false);
            }
            (1, Some(server)) => server.compact(),
            (2, Some(server)) => server.lose_next_list(["services", "endpointslices", "nodes"][random.below(3) as usize]),
            (3 | 4, _) => sleep(Duration::from_millis(random.below(if real { 500 } else { 40_000 }))).await,
            _ => step(&cluster, &mut random).await,
        }
    }
    if let Some(server) = cluster.server() {
        server.set_faults(Faults::none(seed));
        server.lose_no_list();
    }
    settle(&mut source, &cluster, patience).await?;
    if !real {
        // Nothing comes to undo it, be it an event that had been on its way or a list of long ago.
        sleep(Duration::from_secs(200)).await;
        settle(&mut source, &cluster, Duration::from_secs(5)).await?;
    }
    let state = source.state.borrow();
    if let Some(own) = state.nodes().get(OWN) {
        let wanted = Announcement::Overlay {
            underlay: vec!["192.0.2.1".parse().unwrap()],
            port: Some(4790),
            vni: Some(1),
            mtu: Some(1500),
            direct_return_vni: None,
        };
        if own.announcement != wanted {
            return Err(format!("its own Node says {:?} and not {announced:?}", own.announcement));
        }
    }
    drop(state);
    drop(source);
    if let Some(server) = cluster.server() {
        restart_without(server, &cluster, &kept, seed).await?;
    }
    cluster.clean_up().await;
    Ok(())
}

/// A successor that starts while the server is away has what its predecessor had.
async fn restart_without(server: &ApiServer, cluster: &Cluster, kept: &TempDir, seed: u64) -> Result<(), String> {
    let fresh = cluster.fresh().await;
    if fresh.is_empty() {
        return Ok(());
    }
    server.set_outage(true);
    let started = timeout(Duration::from_secs(1), start_in(kept, cluster, seed)).await;
    let successor = started.map_err(|_| "it waits for a server that is away, though it has what that said")?;
    let status = successor.status.borrow().clone();
    if **successor.state.borrow() != fresh || status.connected || !status.complete || status.objects != fresh.len() {
        return Err(format!("it starts with another state than was kept: {status:?}\n{}", difference(&successor.state.borrow(), &fresh)));
    }
    Ok(())
}

#[test]
fn after_every_history_the_state_equals_a_fresh_list() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let real = std::env::var_os("PODGATE_APISERVER").is_some();
    let first = number("PODGATE_KUBERNETES_SEED").unwrap_or_else(|| Random::chance() % 1_000_000_000);
    let histories = number("PODGATE_KUBERNETES_HISTORIES").unwrap_or(if real { 5 } else { 200 });
    println!("{histories} histories from PODGATE_KUBERNETES_SEED={first}");
    for seed in first..first + histories {
        let outcome = run(real, history(seed, real));
        if let Err(error) = outcome {
            panic!("history {seed}: {error}\nagain: PODGATE_KUBERNETES_SEED={seed} PODGATE_KUBERNETES_HISTORIES=1");
        }
    }
}

/// A server with `services` services, and a source that has seen them.
async fn settled(services: u64) -> (ApiServer, Cluster, Source) {
    let server = ApiServer::default();
    let cluster = Cluster::of(server.clone(), None);
    for number in 0..services {
        cluster.put(service(number, 0)).await;
    }
    cluster.put(node(1, 0)).await;
    let mut source = start(&cluster, 1).await;
    settle(&mut source, &cluster, Duration::from_secs(5)).await.unwrap();
    (server, cluster, source)
}

fn names(source: &Source) -> usize {
    source.state.borrow().services().len()
}

#[test]
fn what_is_removed_while_the_server_is_away_is_gone_afterwards_with_or_without_its_history() {
    for forgotten in [false, true] {
        run(false, async {
            let (server, cluster, mut source) = settled(20).await;
            server.set_outage(true);
            for number in 0..5 {
                cluster.delete("services", "default", &format!("web-{number}")).await;
            }
            cluster.put(service(90, 0)).await;
            let lost = source.status.wait_for(|status| !status.connected);
            timeout(Duration::from_secs(35), lost).await.expect("the loss is told in time").unwrap();
            // An hour later everything that was known is still in force.
            sleep(Duration::from_secs(3600)).await;
            assert_eq!(names(&source), 20);
            let status = source.status.borrow().clone();
            assert!(!status.connected && status.errors.iter().all(|issue| issue.reason.contains("refused")), "{status:?}");
            if forgotten {
                server.compact();
            }
            server.set_outage(false);
            settle(&mut source, &cluster, Duration::from_secs(40)).await.unwrap();
            assert_eq!(names(&source), 16);
        });
    }
}

#[test]
fn nobody_is_told_that_all_is_in_step_while_a_list_is_due_because_history_was_lost() {
    for seed in 1..=20 {
        run(false, async {
            let server = ApiServer::default();
            let cluster = Cluster::of(server.clone(), None);
            for number in 0..9 {
                cluster.put(service(number, 0)).await;
            }
            cluster.put(node(1, 0)).await;
            let mut source = start(&cluster, seed).await;
            settle(&mut source, &cluster, Duration::from_secs(5)).await.unwrap();
            server.set_outage(true);
            cluster.delete("services", "default", "web-1").await;
            cluster.delete("nodes", "", OWN).await;
            cluster.put(slice(1, 2, 2)).await;
            sleep(Duration::from_secs(600)).await;
            server.compact();
            server.set_outage(false);
            let fresh = cluster.fresh().await;
            let back = Instant::now();
            while !source.status.borrow().connected {
                assert!(back.elapsed() < Duration::from_secs(40), "seed {seed}: {:?}", source.status.borrow());
                sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(**source.state.borrow(), fresh, "seed {seed}: it says that it is connected, and is behind");
        });
    }
}

#[test]
fn a_list_that_lacks_more_than_half_is_believed_only_when_a_second_one_agrees() {
    run(false, async {
        let (server, cluster, mut source) = settled(10).await;
        source.state.borrow_and_update();
        // Every watch has to begin anew with a list, and the first list of each kind is empty.
        ["services", "nodes"].iter().for_each(|plural| server.lose_next_list(plural));
        server.set_outage(true);
        sleep(Duration::from_secs(5)).await;
        cluster.put(policy(1)).await;
        cluster.delete("networkpolicies", "default", "policy-1").await;
        server.compact();
        server.set_outage(false);
        let doubt = source.status.wait_for(|status| status.errors.iter().any(|issue| issue.reason.contains("until a second list says the same")));
        let said = timeout(Duration::from_secs(60), doubt).await.expect("the doubt is told").unwrap().clone();
        assert!(!said.connected, "{said:?}");
        settle(&mut source, &cluster, Duration::from_secs(60)).await.unwrap();
        assert!(!source.state.has_changed().unwrap(), "something was taken away for a moment");
        // What is really gone is believed.
        server.set_outage(true);
        for number in 0..9 {
            cluster.delete("services", "default", &format!("web-{number}")).await;
        }
        server.compact();
        server.set_outage(false);
        settle(&mut source, &cluster, Duration::from_secs(60)).await.unwrap();
        assert_eq!(names(&source), 1);
    });
}

/// A server with 20 services, and what a source has kept of it on the disk.
async fn kept_of_20() -> (ApiServer, Cluster, TempDir) {
    let kept = tempfile::tempdir().unwrap();
    let server = ApiServer::default();
    let cluster = Cluster::of(server.clone(), None);
    for number in 0..20 {
        cluster.put(service(number, 0)).await;
        cluster.put(slice(number, number, 2)).await;
    }
    cluster.put(node(1, 0)).await;
    let source = start_in(&kept, &cluster, 1).await;
    // What is known first is kept at once, what follows soon.
    cluster.put(policy(1)).await;
    sleep(Duration::from_secs(20)).await;
    drop(source);
    (server, cluster, kept)
}

#[test]
fn a_start_without_the_server_goes_on_with_the_last_state_and_follows_when_it_is_back() {
    run(false, async {
        let (server, cluster, kept) = kept_of_20().await;
        let before = cluster.fresh().await;
        server.set_outage(true);
        for number in 0..5 {
            cluster.delete("services", "default", &format!("web-{number}")).await;
            cluster.delete("endpointslices", "default", &format!("slice-{number}")).await;
        }
        cluster.put(service(90, 0)).await;
        let begun = Instant::now();
        let mut source = start_in(&kept, &cluster, 2).await;
        assert!(begun.elapsed() < Duration::from_secs(1), "it started after {:?}", begun.elapsed());
        assert_eq!(*source.state.borrow_and_update(), before.into());
        let status = source.status.wait_for(|status| status.errors.len() == 5).await.unwrap().clone();
        assert!(status.complete && !status.connected && status.objects == 42, "{status:?}");
        sleep(Duration::from_secs(3600)).await;
        assert!(!source.state.has_changed().unwrap());
        server.set_outage(false);
        settle(&mut source, &cluster, Duration::from_secs(40)).await.unwrap();
        assert_eq!(names(&source), 16);
        // With nothing on the disk there is nothing to go on with.
        server.set_outage(true);
        let blank = tempfile::tempdir().unwrap();
        assert!(timeout(Duration::from_secs(600), start_in(&blank, &cluster, 3)).await.is_err(), "it went on with nothing");
    });
}

#[test]
fn a_first_list_that_lacks_more_than_half_of_what_was_kept_is_believed_only_when_a_second_one_agrees() {
    run(false, async {
        let (server, cluster, kept) = kept_of_20().await;
        ["services", "endpointslices", "nodes"].iter().for_each(|plural| server.lose_next_list(plural));
        let mut source = start_in(&kept, &cluster, 2).await;
        assert_eq!(names(&source), 20);
        settle(&mut source, &cluster, Duration::from_secs(10)).await.unwrap();
        assert!(!source.state.has_changed().unwrap(), "something was taken away for a moment");
        // What is really gone is believed.
        drop(source);
        for number in 0..19 {
            cluster.delete("services", "default", &format!("web-{number}")).await;
        }
        let mut source = start_in(&kept, &cluster, 3).await;
        settle(&mut source, &cluster, Duration::from_secs(10)).await.unwrap();
        assert_eq!(names(&source), 1);
    });
}

#[test]
fn a_connection_that_dies_in_silence_is_noticed_within_35_seconds() {
    run(false, async {
        let (server, cluster, mut source) = settled(3).await;
        server.set_faults(Faults { silent: 1000, ..Faults::none(1) });
        cluster.put(service(7, 0)).await;
        // The watch that was to bring it says nothing any more.
        let start = Instant::now();
        let noticed = source.status.wait_for(|status| status.errors.iter().any(|issue| issue.reason.contains("the connection is dead")));
        timeout(Duration::from_secs(35), noticed).await.expect("it is noticed in time").unwrap();
        println!("noticed after {:?}", start.elapsed());
        server.set_faults(Faults::none(1));
        settle(&mut source, &cluster, Duration::from_secs(40)).await.unwrap();
        assert_eq!(names(&source), 4);
    });
}

#[test]
fn nothing_is_known_before_every_kind_has_been_listed() {
    run(false, async {
        let server = ApiServer::default();
        let cluster = Cluster::of(server.clone(), None);
        cluster.put(service(1, 0)).await;
        server.set_outage(true);
        let client = cluster.client();
        let nothing = tempfile::tempdir().unwrap();
        let starting = tokio::spawn(async move { start_with(client, OWN, nothing.path(), timing(), 1).await });
        sleep(Duration::from_secs(600)).await;
        assert!(!starting.is_finished(), "it started from nothing");
        server.set_outage(false);
        let source = timeout(Duration::from_secs(40), starting).await.expect("it starts when the server is there").unwrap().unwrap();
        assert_eq!(names(&source), 1);
        assert!(source.status.borrow().connected);
    });
}

#[test]
fn the_rules_that_are_shipped_are_enough_and_none_is_too_much() {
    let rules = Rule::of_manifest(RBAC).unwrap();
    let shipped: BTreeSet<Use> = rules.iter().flat_map(Rule::uses).collect();
    run(false, async {
        let server = ApiServer::default();
        let admin = Cluster::of(server.clone(), Some("admin"));
        server.allow("admin", None);
        server.allow("gateway", Some(rules.clone()));
        admin.put(node(1, 0)).await;
        admin.put(service(1, 0)).await;
        let gateway = Cluster::of(server.clone(), Some("gateway"));
        let mut source = start(&gateway, 1).await;
        source.announce(Announcement::annotations(&["192.0.2.1".parse().unwrap()], &OVERLAY, 1500));
        source.forwards.send_replace(true);
        timeout(Duration::from_secs(5), admin.wait_for_condition(OWN, "NetworkUnavailable", "False PodgateIsUp"))
            .await
            .expect("it may say that it is up");
        settle(&mut source, &admin, Duration::from_secs(5)).await.unwrap();
        let announced = source.state.wait_for(|state| matches!(state.nodes()[OWN].announcement, Announcement::Overlay { .. }));
        timeout(Duration::from_secs(5), announced).await.expect("it may announce itself").unwrap();
        assert_eq!(server.used(), shipped);
        // One of them taken away is told by its name.
        let fewer: Vec<Rule> = rules.iter().filter(|rule| rule.resources != ["services"]).cloned().collect();
        server.allow("gateway", Some(fewer));
        server.set_outage(true);
        sleep(Duration::from_secs(1)).await;
        server.set_outage(false);
        // By then the others are in step again.
        let refused = source.status.wait_for(|status| status.errors.len() == 1 && status.errors[0].reason.contains("no leave to watch services"));
        let status = timeout(Duration::from_secs(40), refused).await.expect("a refusal is told").unwrap().clone();
        assert!(!status.connected && status.errors[0].reason.contains("deploy/kubernetes/rbac.yaml"), "{status:?}");
        // A token that is not known at all.
        let stranger = Cluster::of(server.clone(), Some("stranger"));
        assert!(timeout(Duration::from_secs(60), start(&stranger, 1)).await.is_err());
    });
}

#[test]
fn a_gateways_announcement_is_put_back_whenever_it_is_not_what_it_should_be() {
    run(false, async {
        let (_server, cluster, mut source) = settled(1).await;
        let overlay = |state: &ClusterState| match state.nodes().get(OWN)?.announcement.clone() {
            Announcement::Overlay { underlay, mtu, .. } => Some((underlay, mtu)),
            _ => None,
        };
        let wanted = |mtu| Some((vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()], Some(mtu)));
        let announced = |mtu| Announcement::annotations(&["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()], &OVERLAY, mtu);
        let patience = Duration::from_secs(10);
        source.announce(announced(1500));
        timeout(patience, source.state.wait_for(|state| overlay(state) == wanted(1500))).await.expect("it is announced").unwrap();
        source.announce(announced(9000));
        timeout(patience, source.state.wait_for(|state| overlay(state) == wanted(9000))).await.expect("a change is announced").unwrap();
        // Removed, made into nonsense, and with its Node removed and made again.
        for annotations in [json!({"podgate.io/underlay": null, "podgate.io/overlay": null}), json!({"podgate.io/overlay": "vni=many"})] {
            cluster.annotate("nodes", OWN, annotations).await;
            timeout(patience, cluster.wait_for_annotation(OWN, "podgate.io/overlay", "port=4790,vni=1,mtu=9000")).await.expect("it is put back");
        }
        cluster.delete("nodes", "", OWN).await;
        timeout(patience, source.state.wait_for(|state| state.nodes().is_empty())).await.expect("the Node goes").unwrap();
        cluster.put(node(1, 0)).await;
        timeout(patience, source.state.wait_for(|state| overlay(state) == wanted(9000))).await.expect("it is announced anew").unwrap();
        settle(&mut source, &cluster, patience).await.unwrap();
    });
}

#[test]
fn a_node_that_forwards_has_a_network_and_says_so_again_only_after_a_while() {
    run(false, async {
        let (server, cluster, source) = settled(1).await;
        let soon = Duration::from_secs(10);
        let ours = || timeout(soon, cluster.wait_for_condition(OWN, "NetworkUnavailable", "False PodgateIsUp"));
        cluster.set_condition(OWN, "Ready", "True", "KubeletReady").await;
        cluster.set_condition(OWN, "NetworkUnavailable", "True", "NoRouteCreated").await;
        assert!(ours().await.is_err(), "it says so before the node is ready");
        source.forwards.send_replace(true);
        ours().await.expect("it says so when the node is ready");
        timeout(soon, cluster.wait_for_condition(OWN, "Ready", "True KubeletReady")).await.expect("others' conditions stay");
        // Somebody who repeats his word is contradicted once in five minutes.
        let (start, mut contradictions) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(3600) {
            cluster.set_condition(OWN, "NetworkUnavailable", "True", "NoRouteCreated").await;
            sleep(Duration::from_millis(9_700)).await;
            let status = &server.objects("nodes")[0]["status"]["conditions"];
            contradictions += status.as_array().into_iter().flatten().filter(|condition| condition["reason"] == "PodgateIsUp").count();
        }
        assert!((10..=12).contains(&contradictions), "{contradictions} in an hour");
        // His word that there is a network is as good.
        cluster.set_condition(OWN, "NetworkUnavailable", "False", "RouteCreated").await;
        sleep(Duration::from_secs(600)).await;
        timeout(soon, cluster.wait_for_condition(OWN, "NetworkUnavailable", "False RouteCreated")).await.expect("it is left alone");
        // Another Node of the name knows nothing yet.
        cluster.delete("nodes", "", OWN).await;
        sleep(soon).await;
        cluster.put(node(1, 0)).await;
        ours().await.expect("a Node that is made anew is told");
    });
}

#[test]
fn an_object_that_makes_no_sense_keeps_what_it_said_before_and_is_named() {
    run(false, async {
        let (_server, cluster, mut source) = settled(2).await;
        let patience = Duration::from_secs(10);
        let before = source.state.borrow().clone();
        let mut broken = service(1, 0);
        broken["spec"]["ports"][0]["port"] = json!(70_000);
        cluster.put(broken).await;
        let told = timeout(patience, source.status.wait_for(|status| !status.errors.is_empty())).await.expect("it is told").unwrap().clone();
        assert!(told.connected, "the others are as the server has them: {told:?}");
        let said = told.errors[0].to_string();
        assert!(said.starts_with("Service default/web-1: spec.ports") && said.contains("70000"), "{said}");
        assert_eq!(before, *source.state.borrow());
        cluster.put(service(1, 1)).await;
        settle(&mut source, &cluster, patience).await.unwrap();
        assert_ne!(before, *source.state.borrow());
    });
}

#[test]
fn a_server_without_service_ranges_or_policies_is_no_failure() {
    run(false, async {
        let server = ApiServer::default();
        let cluster = Cluster::of(server, None).without(&["servicecidrs", "networkpolicies"]);
        cluster.put(service(1, 0)).await;
        let source = start(&cluster, 1).await;
        let status = source.status.borrow().clone();
        assert!(status.connected && status.errors.is_empty(), "{status:?}");
        assert_eq!(names(&source), 1);
    });
}

#[test]
fn service_ranges_are_read_where_there_are_any() {
    run(false, async {
        let (_server, cluster, mut source) = settled(1).await;
        let ranges: Value = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": ["10.96.0.0/16"]}});
        cluster.put(ranges).await;
        let seen = source.state.wait_for(|state| state.service_cidrs().contains_key("kubernetes"));
        timeout(Duration::from_secs(10), seen).await.expect("it is seen").unwrap();
        cluster.delete("servicecidrs", "", "kubernetes").await;
        let gone = source.state.wait_for(|state| state.service_cidrs().is_empty());
        timeout(Duration::from_secs(10), gone).await.expect("it goes").unwrap();
    });
}
