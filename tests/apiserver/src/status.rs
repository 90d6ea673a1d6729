//! Errors as Kubernetes tells them: a `v1/Status` with code, reason and details, by which clients decide what to do.

use axum::body::Body;
use axum::http::{Response, StatusCode, header};
use serde_json::{Value, json};

use crate::resources::Resource;

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub code: u16,
    /// A word that clients compare (`StatusReason` in apimachinery).
    pub reason: &'static str,
    pub message: String,
    pub details: Value,
}

impl Refusal {
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { code, reason, message: message.into(), details: json!({}) }
    }

    pub fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal::new(400, "BadRequest", message)
    }

    /// There is no such path.
    pub fn no_path() -> Refusal {
        Refusal::new(404, "NotFound", "the server could not find the requested resource")
    }

    pub fn not_found(resource: &Resource, name: &str) -> Refusal {
        Refusal::of(resource, name, 404, "NotFound", "not found")
    }

    pub fn already_exists(resource: &Resource, name: &str) -> Refusal {
        Refusal::of(resource, name, 409, "AlreadyExists", "already exists")
    }

    pub fn conflict(resource: &Resource, name: &str) -> Refusal {
        let what = "the object has been modified; please apply your changes to the latest version and try again";
        let mut refusal = Refusal::of(resource, name, 409, "Conflict", "");
        refusal.message = format!("Operation cannot be fulfilled on {} \"{name}\": {what}", resource.qualified());
        refusal
    }

    pub fn invalid(resource: &Resource, name: &str, problem: &str) -> Refusal {
        let mut refusal = Refusal::of(resource, name, 422, "Invalid", "");
        refusal.message = format!("{} \"{name}\" is invalid: {problem}", resource.kind);
        refusal
    }

    /// What was asked for lies too far back.
    pub fn gone(version: u64, oldest: u64) -> Refusal {
        Refusal::new(410, "Expired", format!("too old resource version: {version} ({oldest})"))
    }

    fn of(resource: &Resource, name: &str, code: u16, reason: &'static str, what: &str) -> Refusal {
        let details = json!({"name": name, "group": resource.group, "kind": resource.plural});
        Refusal { code, reason, message: format!("{} \"{name}\" {what}", resource.qualified()), details }
    }

    /// The object.
    pub fn object(&self) -> Value {
        json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "details": self.details, "code": self.code
        })
    }

    pub fn response(&self) -> Response<Body> {
        respond(self.code, &self.object())
    }
}

/// `value` as an answer.
pub(crate) fn respond(code: u16, value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
