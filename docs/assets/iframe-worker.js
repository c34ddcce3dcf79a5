// A page that is opened from disk may not start a Web Worker, so the search would not work there. This stand-in runs the
// worker's script in a hidden frame, which may load scripts from disk, and passes the messages on. Over http it does nothing.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      (document.body || document.documentElement).append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.receive = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      this.waiting = [];
      const script = inside.document.createElement("script");
      script.src = new URL(url, location.href).href;
      script.onload = () => {
        this.waiting.forEach(this.receive);
        this.waiting = null;
      };
      inside.document.head.append(script);
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.receive(data);
    }
  };
}
