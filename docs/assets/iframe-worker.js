// Search runs in a worker, which browsers refuse to start from a folder. There, and only there, a
// hidden frame with the same interface takes its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessageOut = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }));
      inside.base = new URL(".", url).href;
      frame.contentDocument.open();
      frame.contentDocument.write(`<!doctype html><body><script>
        window.postMessage = (data) => setTimeout(() => postMessageOut(data));
        window.importScripts = (...urls) => Promise.all(urls.map((name) => new Promise((done) => {
          const script = document.createElement("script");
          script.src = new URL(name, base).href;
          script.onload = done;
          document.body.append(script);
        })));
      <\/script><script src="${url}"><\/script>`);
      frame.contentDocument.close();
      this.inside = inside;
      this.waiting = [];
      frame.addEventListener("load", () => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
      this.frame = frame;
    }

    postMessage(data) {
      if (!this.ready) {
        this.waiting.push(data);
        return;
      }
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
    }

    set onmessage(listener) {
      this.addEventListener("message", listener);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
