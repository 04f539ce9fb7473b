// The visible words of the page that stand out too little from their ground: WCAG 2.2 asks for a contrast of 4.5, and
// for 3 where the letters are large. What is disabled is exempt.
() => {
    const parse = colour => { const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
    const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = element => {
        const layers = [];
        for (let e = element; e; e = e.parentElement) {
            const style = getComputedStyle(e);
            const colours = style.backgroundImage.match(/rgba?\([^)]*\)/g);
            layers.push(parse(colours ? colours[0] : style.backgroundColor));
        }
        return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
        if (!text || !e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.closest(":disabled, script, style")) continue;
        const style = getComputedStyle(e), back = ground(e), front = over(parse(style.color), back);
        const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
        const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < (large ? 3 : 4.5)) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(1)} (${style.color} on ${back.map(Math.round)})`);
    }
    return found;
}
