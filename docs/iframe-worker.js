// Browsers refuse workers to pages that are opened from disk. There the search worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const scope = frame.contentWindow
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = new Promise((resolve, reject) => {
        const script = frame.contentDocument.createElement("script")
        script.src = new URL(url, document.baseURI)
        script.onload = () => resolve(scope)
        script.onerror = reject
        frame.contentDocument.body.append(script)
      })
    }

    async postMessage(data) {
      const scope = await this.ready
      scope.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
