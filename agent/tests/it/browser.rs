//! The pages in a real browser: Chromium, driven by chromedriver as the W3C's WebDriver says (https://www.w3.org/TR/webdriver2/).

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::landfall::{Landfall, free_port};
use crate::support::eventually;

struct Browser {
    driver: Child,
    /// Where the driver takes commands for our one session.
    session: String,
    http: reqwest::Client,
    profile: tempfile::TempDir,
}

impl Browser {
    async fn start() -> Self {
        let port = free_port();
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("chromedriver is there: `make test` installs it");
        let mut browser = Self {
            driver,
            session: format!("http://127.0.0.1:{port}/session"),
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            profile: tempfile::tempdir().unwrap(),
        };
        let status = format!("http://127.0.0.1:{port}/status");
        eventually(
            "chromedriver answers",
            Duration::from_secs(30),
            async || browser.http.get(&status).send().await.ok().map(drop),
        )
        .await;
        let arguments = [
            "--headless=new",
            // As root there is no sandbox; the pipe ends the browser with its driver.
            "--no-sandbox",
            "--remote-debugging-pipe",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--window-size=1200,900",
            &format!("--user-data-dir={}", browser.profile.path().display()),
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let session = browser.send("", wanted).await;
        let id = session["sessionId"].as_str().unwrap().to_owned();
        browser.session = format!("{}/{id}", browser.session);
        browser
    }

    async fn send(&self, command: &str, body: Value) -> Value {
        let request = self.http.post(format!("{}{command}", self.session));
        let answer = request.json(&body).send().await.unwrap();
        let mut answer: Value = answer.json().await.unwrap();
        let value = answer["value"].take();
        assert!(value["error"].is_null(), "{command}: {value:#}");
        value
    }

    async fn open(&self, url: &str) {
        self.send("/url", json!({"url": url})).await;
    }

    /// What this expression of JavaScript is in the page.
    async fn is(&self, expression: &str) -> Value {
        let script = format!("return {expression}");
        self.send("/execute/sync", json!({"script": script, "args": []}))
            .await
    }

    async fn becomes(&self, expression: &str, wanted: &Value, limit: Duration) {
        let what = format!("{expression} is {wanted}");
        eventually(&what, limit, async || {
            (self.is(expression).await == *wanted).then_some(())
        })
        .await;
    }

    /// What the page said on its console, a broken Content-Security-Policy included.
    async fn console(&self) -> Vec<String> {
        let entries = self.send("/se/log", json!({"type": "browser"})).await;
        let entries = entries.as_array().unwrap().iter();
        entries
            .map(|entry| entry["message"].as_str().unwrap().to_owned())
            .collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_browser_shows_a_build_live_over_a_restart_of_the_agent_without_loading_anew() {
    let browser = Browser::start().await;
    let mut landfall = Landfall::start("browser").await;
    let test = "printf '\\033[31mred\\033[0m and <b>no tag</b>\\n'; \
                for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do printf 'tick %s\\n' $i; sleep 1; done";
    let id = landfall.push(&[("test.sh", test)]).await;
    landfall.reach(id, "test").await;

    browser.open(&landfall.url(&format!("/builds/{id}"))).await;
    browser.is("window.notLoadedAnew = true").await;
    let line = |text: &str| {
        format!(
            "[...document.querySelectorAll('[data-stage=test] .line span')].some(it => it.textContent === '{text}')"
        )
    };
    browser.becomes(&line("tick 2"), &json!(true), SOON).await;
    let state = "document.getElementById('log-state').textContent";
    browser.becomes(state, &json!("Live: Test"), SOON).await;
    let red = "[...document.querySelectorAll('.line i.f1')].map(it => it.textContent).join()";
    assert_eq!(browser.is(red).await, "red");
    assert_eq!(browser.is(&line("red and <b>no tag</b>")).await, true);
    assert_eq!(browser.is("document.querySelectorAll('b').length").await, 0);

    landfall.terminate();
    let lost = json!("Connection lost, trying again …");
    browser.becomes(state, &lost, SOON).await;
    landfall.run().await;
    let build = landfall.end(id).await;
    assert_eq!(build["status"], "passed", "{build:#}");
    let status = "document.querySelector('.build-head').dataset.status";
    browser.becomes(status, &json!("passed"), SOON).await;
    assert_eq!(browser.is("window.notLoadedAnew").await, true);
    assert_eq!(
        browser.is("document.getElementById('follow').hidden").await,
        true
    );
    let title = browser.is("document.title").await;
    assert!(title.as_str().unwrap().starts_with("Passed"), "{title}");

    let shown = browser
        .is("[...document.querySelectorAll('.line')].map(it => it.id)")
        .await;
    let lines = landfall.log(id).await.lines().count();
    let expected: Vec<String> = (1..=lines).map(|n| format!("L{n}")).collect();
    assert_eq!(shown, json!(expected), "gaps or doubles");

    let asked = browser
        .is("performance.getEntriesByType('resource').map(it => new URL(it.name).origin).filter(it => it !== location.origin)")
        .await;
    assert_eq!(asked, json!([]), "asked elsewhere");
    // Only of the restart: the stream was cut and its next tries were refused.
    let wrong: Vec<String> = browser.console().await;
    let is_expected = |line: &&String| !(line.contains("/log/live") && line.contains("net::ERR_"));
    let wrong: Vec<&String> = wrong.iter().filter(is_expected).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_browser_sees_a_new_build_in_the_list_without_loading_anew() {
    let browser = Browser::start().await;
    let mut landfall = Landfall::start("list").await;
    browser.open(&landfall.url("/")).await;
    browser.is("window.notLoadedAnew = true").await;
    let id = landfall
        .push(&[("test.sh", "echo this cannot be; exit 1")])
        .await;
    let build = landfall.end(id).await;
    assert_eq!(build["status"], "failed", "{build:#}");
    let shown = format!(
        "document.querySelector('#list a[href=\"/builds/{id}\"]') !== null && document.getElementById('list').textContent.includes('Failed')"
    );
    browser.becomes(&shown, &json!(true), SOON).await;
    assert_eq!(browser.is("window.notLoadedAnew").await, true);
    let said = browser.console().await;
    assert!(said.is_empty(), "{said:#?}");
}
