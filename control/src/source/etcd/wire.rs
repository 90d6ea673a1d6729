//! What etcd's JSON gateway speaks: proto3's JSON form of etcd's own messages, in which bytes are base64 and 64-bit integers are strings.
//!
//! Read first: etcd `api/etcdserverpb/rpc.proto` (3.4: `etcdserver/etcdserverpb/rpc.proto`) and `api/mvccpb/kv.proto`. What is absent from an
//! answer has its type's default.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes: keys and values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes64(pub Vec<u8>);

impl From<&str> for Bytes64 {
    fn from(text: &str) -> Bytes64 {
        Bytes64(text.into())
    }
}

impl Serialize for Bytes64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes64, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map(Bytes64).map_err(de::Error::custom)
    }
}

/// A 64-bit integer: written as a string, read as either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Int(pub i64);

impl Serialize for Int {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Int, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(i64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(number) => Ok(Int(number)),
            // Identifiers of leases are unsigned in some versions' output.
            Either::Text(text) => text.parse().or_else(|_| text.parse::<u64>().map(|n| n as i64)).map(Int).map_err(de::Error::custom),
        }
    }
}

/// `ResponseHeader`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Header {
    /// The store's revision when it answered.
    #[serde(default)]
    pub revision: Int,
}

/// `KeyValue`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct KeyValue {
    /// The key.
    #[serde(default)]
    pub key: Bytes64,
    /// The revision at which it was made.
    #[serde(default)]
    pub create_revision: Int,
    /// The revision at which it was last written.
    #[serde(default)]
    pub mod_revision: Int,
    /// Its value.
    #[serde(default)]
    pub value: Bytes64,
    /// The lease with which it goes; 0 for none.
    #[serde(default)]
    pub lease: Int,
}

/// `RangeRequest`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RangeRequest {
    /// The first key, or the only one.
    pub key: Bytes64,
    /// The first key that is not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range_end: Option<Bytes64>,
    /// At most so many; 0 for all.
    pub limit: Int,
    /// As of this revision; 0 for now.
    pub revision: Int,
}

/// `RangeResponse`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct RangeResponse {
    /// The header.
    #[serde(default)]
    pub header: Header,
    /// What was found, by key.
    #[serde(default)]
    pub kvs: Vec<KeyValue>,
    /// Whether there is more of it.
    #[serde(default)]
    pub more: bool,
    /// How many there are in the range, whatever the limit.
    #[serde(default)]
    pub count: Int,
}

/// `Compare`: of a key's revision of creation, or of its last change.
#[derive(Clone, Debug, Serialize)]
pub struct Compare {
    key: Bytes64,
    target: &'static str,
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_revision: Option<Int>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mod_revision: Option<Int>,
}

impl Compare {
    /// The key was made at `revision`; 0: it does not exist.
    pub fn created(key: &str, revision: i64) -> Compare {
        Compare { key: key.into(), target: "CREATE", result: "EQUAL", create_revision: Some(Int(revision)), mod_revision: None }
    }

    /// The key was last written at `revision`; 0: it does not exist.
    pub fn modified(key: &str, revision: i64) -> Compare {
        Compare { key: key.into(), target: "MOD", result: "EQUAL", create_revision: None, mod_revision: Some(Int(revision)) }
    }
}

/// `RequestOp`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names that etcd has for them")]
pub enum Op {
    /// Write.
    RequestPut(PutRequest),
    /// Read.
    RequestRange(RangeRequest),
    /// Delete.
    RequestDeleteRange(DeleteRequest),
}

impl Op {
    /// Writes `value` under `key`, to go with `lease` (0: with none).
    pub fn put(key: &str, value: &str, lease: i64) -> Op {
        Op::RequestPut(PutRequest { key: key.into(), value: value.into(), lease: Int(lease) })
    }

    /// Reads `key`.
    pub fn read(key: &str) -> Op {
        Op::RequestRange(RangeRequest { key: key.into(), ..RangeRequest::default() })
    }

    /// Deletes `key`.
    pub fn delete(key: &str) -> Op {
        Op::RequestDeleteRange(DeleteRequest { key: key.into() })
    }
}

/// `PutRequest`.
#[derive(Clone, Debug, Serialize)]
pub struct PutRequest {
    key: Bytes64,
    value: Bytes64,
    lease: Int,
}

/// `DeleteRangeRequest`, of one key.
#[derive(Clone, Debug, Serialize)]
pub struct DeleteRequest {
    key: Bytes64,
}

/// `TxnRequest`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TxnRequest {
    /// All of these must hold.
    pub compare: Vec<Compare>,
    /// Then these are done.
    pub success: Vec<Op>,
    /// Else these.
    pub failure: Vec<Op>,
}

/// `TxnResponse`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TxnResponse {
    /// The header.
    #[serde(default)]
    pub header: Header,
    /// Whether the conditions held.
    #[serde(default)]
    pub succeeded: bool,
    /// What the operations said, in their order.
    #[serde(default)]
    pub responses: Vec<OpResponse>,
}

impl TxnResponse {
    /// The key that the first operation read, if it is there.
    pub fn read(self) -> Option<KeyValue> {
        self.responses.into_iter().next()?.response_range?.kvs.into_iter().next()
    }
}

/// `ResponseOp`, of which only reads are looked at.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct OpResponse {
    /// What was read.
    pub response_range: Option<RangeResponse>,
}

/// `LeaseGrantRequest`, or `LeaseKeepAliveRequest` and `LeaseRevokeRequest`, which have only the identifier.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LeaseRequest {
    /// In seconds, for a grant.
    #[serde(rename = "TTL", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Int>,
    /// Which lease; 0 leaves the choice to etcd.
    #[serde(rename = "ID")]
    pub id: Int,
}

/// `LeaseGrantResponse`, `LeaseKeepAliveResponse`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct LeaseResponse {
    /// Which lease.
    #[serde(rename = "ID", default)]
    pub id: Int,
    /// How long it lasts from now, in seconds; 0 or less: it is over.
    #[serde(rename = "TTL", default)]
    pub ttl: Int,
}

/// `AuthenticateRequest`.
#[derive(Clone, Serialize)]
pub struct AuthenticateRequest<'a> {
    /// The user.
    pub name: &'a str,
    /// The password.
    pub password: &'a str,
}

/// `AuthenticateResponse`.
#[derive(Clone, Deserialize)]
pub struct AuthenticateResponse {
    /// Goes into the header `Authorization`.
    #[serde(default)]
    pub token: String,
}

/// `WatchRequest` with a `WatchCreateRequest`.
#[derive(Clone, Debug, Serialize)]
pub struct WatchRequest {
    /// What is watched.
    pub create_request: WatchCreateRequest,
}

/// `WatchCreateRequest`.
#[derive(Clone, Debug, Serialize)]
pub struct WatchCreateRequest {
    /// The first key.
    pub key: Bytes64,
    /// The first key that is not watched.
    pub range_end: Bytes64,
    /// From this revision on.
    pub start_revision: Int,
}

/// `WatchResponse`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct WatchResponse {
    /// The watch has begun.
    #[serde(default)]
    pub created: bool,
    /// The watch is over.
    #[serde(default)]
    pub canceled: bool,
    /// If it is over because the revision that it was to begin at is no longer kept: the first that is.
    #[serde(default)]
    pub compact_revision: Int,
    /// Why it is over.
    #[serde(default)]
    pub cancel_reason: String,
    /// What happened, in the order of revisions.
    #[serde(default)]
    pub events: Vec<Event>,
}

/// `Event`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Event {
    /// What happened; absent for `PUT`.
    #[serde(rename = "type", default)]
    pub kind: EventKind,
    /// The key; of one that was deleted, with the revision of the deletion and nothing else.
    #[serde(default)]
    pub kv: KeyValue,
}

/// `Event.EventType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EventKind {
    /// Written.
    #[default]
    Put,
    /// Deleted, or gone with its lease.
    Delete,
}

/// An element of a streamed answer.
#[derive(Debug, Deserialize)]
pub struct Streamed<T> {
    /// What it holds.
    pub result: Option<T>,
    /// Or why it holds nothing.
    pub error: Option<Failure>,
}

/// Why a request failed, as the gateway of any version puts it.
#[derive(Debug, Default, Deserialize)]
pub struct Failure {
    /// gRPC's status code.
    #[serde(default, alias = "grpc_code")]
    pub code: u32,
    /// What etcd says.
    #[serde(default)]
    pub message: String,
    /// The same, in version 3.4 and earlier.
    #[serde(default)]
    pub error: String,
}

impl Failure {
    /// What etcd says.
    pub fn text(&self) -> &str {
        if self.message.is_empty() { &self.error } else { &self.message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_written_as_the_gateway_reads_them() {
        let txn = TxnRequest {
            compare: vec![Compare::created("/a", 0), Compare::modified("/b", 7)],
            success: vec![Op::put("/a", "x", 5), Op::delete("/b")],
            failure: vec![Op::read("/a")],
        };
        let expected = serde_json::json!({
            "compare": [
                {"key": "L2E=", "target": "CREATE", "result": "EQUAL", "create_revision": "0"},
                {"key": "L2I=", "target": "MOD", "result": "EQUAL", "mod_revision": "7"}
            ],
            "success": [
                {"request_put": {"key": "L2E=", "value": "eA==", "lease": "5"}},
                {"request_delete_range": {"key": "L2I="}}
            ],
            "failure": [{"request_range": {"key": "L2E=", "limit": "0", "revision": "0"}}]
        });
        assert_eq!(serde_json::to_value(txn).unwrap(), expected);
    }

    #[test]
    fn answers_are_read_whatever_is_left_out() {
        // As etcd 3.4.23 writes them.
        let line = r#"{"result":{"header":{"cluster_id":"14841639068965178418","revision":"5"},"events":[{"kv":{"key":"L2E=","create_revision":"5","mod_revision":"5","version":"1","value":"eA=="}},{"type":"DELETE","kv":{"key":"L2I=","mod_revision":"6"}}]}}"#;
        let read: Streamed<WatchResponse> = serde_json::from_str(line).unwrap();
        let events = read.result.unwrap().events;
        assert_eq!((events[0].kind, events[0].kv.value.0.as_slice()), (EventKind::Put, &b"x"[..]));
        assert_eq!((events[1].kind, events[1].kv.mod_revision), (EventKind::Delete, Int(6)));
        let failure: Failure =
            serde_json::from_str(r#"{"error":"etcdserver: requested lease not found","message":"etcdserver: requested lease not found","code":5}"#)
                .unwrap();
        assert_eq!((failure.code, failure.text()), (5, "etcdserver: requested lease not found"));
    }
}
