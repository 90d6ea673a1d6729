//! A bearer token in a file, as a pod's service account has it: somebody replaces it there before it expires.
//!
//! It is read for every request, of which there are some in a minute. Blanks around it are no part of it: an editor ends a file with a newline,
//! `kubectl` takes that (`clientcmd`), and a header cannot carry it.

use std::path::{Path, PathBuf};

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request};
use kube::config::AuthInfo;

use super::access::AccessError;

/// The file, and the token that was last read from it.
#[derive(Clone, Debug)]
pub(super) struct TokenFile {
    path: PathBuf,
    bearer: HeaderValue,
}

impl TokenFile {
    /// Takes the file out of `auth`, if the token in it is what counts there.
    pub fn take(auth: &mut AuthInfo) -> Result<Option<TokenFile>, AccessError> {
        if auth.token.is_some() || auth.username.is_some() {
            return Ok(None);
        }
        let Some(path) = auth.token_file.take().map(PathBuf::from) else { return Ok(None) };
        let bearer = read(&path).map_err(|reason| AccessError::Token { path: path.display().to_string(), reason })?;
        Ok(Some(TokenFile { path, bearer }))
    }

    /// The request with the token. When it cannot be read any more, the last one may still be good.
    pub fn sign<B>(&mut self, mut request: Request<B>) -> Request<B> {
        if let Ok(bearer) = read(&self.path) {
            self.bearer = bearer;
        }
        request.headers_mut().insert(AUTHORIZATION, self.bearer.clone());
        request
    }
}

/// The header. What is wrong is said without the token.
fn read(path: &Path) -> Result<HeaderValue, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let token = text.trim();
    if token.is_empty() {
        return Err("it is empty".into());
    }
    let mut bearer = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| "it holds more than one line, or no text".to_owned())?;
    bearer.set_sensitive(true);
    Ok(bearer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(path: &Path) -> Result<TokenFile, String> {
        let mut auth = AuthInfo { token_file: Some(path.display().to_string()), ..AuthInfo::default() };
        TokenFile::take(&mut auth).map(|token| token.unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_token_is_read_without_the_blanks_around_it_and_anew_for_each_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "first\n").unwrap();
        let mut token = take(&path).unwrap();
        let mut signed = || token.sign(Request::new(())).headers()[AUTHORIZATION].to_str().unwrap().to_owned();
        assert_eq!(signed(), "Bearer first");
        std::fs::write(&path, " second\r\n").unwrap();
        assert_eq!(signed(), "Bearer second");
        // Half replaced: the last one goes on.
        std::fs::write(&path, "").unwrap();
        assert_eq!(signed(), "Bearer second");
    }

    #[test]
    fn a_file_without_a_token_is_named_and_what_it_holds_is_not_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(take(&path).unwrap_err().contains("No such file"));
        for text in ["", "\n", "hush\nhush\n"] {
            std::fs::write(&path, text).unwrap();
            let said = take(&path).unwrap_err();
            assert!(said.contains(&path.display().to_string()) && !said.contains("hush"), "{said}");
        }
    }
}
