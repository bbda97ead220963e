# The sample app, from source to an image of 2 MB without a shell. A plain `docker build` is enough:
#   docker build -t hello-axum .
#   docker build --target test -t hello-axum-test . && docker run --rm --network none hello-axum-test

ARG RUST_IMAGE=rust:1-slim-bookworm

# What both kinds of dependencies are built from: the manifests, and no code.
FROM ${RUST_IMAGE} AS manifests
RUN mkdir /work && chown 65532:65532 /work
USER 65532:65532
WORKDIR /work
ENV CARGO_HOME=/work/.cargo CARGO_INCREMENTAL=0
# The agent is a member of the workspace: Cargo wants a target of it, though nothing of it is built here.
RUN mkdir -p agent/src app/src && touch agent/src/lib.rs && echo 'fn main() {}' > app/src/main.rs
COPY --chown=65532:65532 Cargo.toml Cargo.lock ./
COPY --chown=65532:65532 agent/Cargo.toml agent/
COPY --chown=65532:65532 app/Cargo.toml app/

# Each pair of stages compiles the dependencies, which stay cached, and then the app.
# `touch`, because Cargo goes by times, and the real code may be older than the empty one.
FROM manifests AS test-dependencies
RUN cargo test --locked -p app --no-run

FROM test-dependencies AS test
COPY --chown=65532:65532 app app
RUN touch app/src/main.rs && cargo test --locked --offline -p app --no-run
CMD ["cargo", "test", "--locked", "--offline", "-p", "app"]

FROM manifests AS dependencies
RUN cargo rustc --locked --profile app -p app -- -C target-feature=+crt-static

FROM dependencies AS build
COPY --chown=65532:65532 app app
RUN touch app/src/main.rs && cargo rustc --locked --offline --profile app -p app -- -C target-feature=+crt-static

FROM scratch
COPY --from=build /work/target/app/app /app
USER 65532:65532
EXPOSE 5000
ENTRYPOINT ["/app"]
# Last, and only here: a new commit alone leaves every layer above as it was.
ARG GIT_COMMIT=unknown
ENV GIT_COMMIT=${GIT_COMMIT}
